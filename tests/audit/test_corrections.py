"""Decisions on labels: on disk before anything else, exactly those that count in order, applied to the labels."""

import csv
import errno
import os
import re

import numpy as np
import pytest
from expected import refused

from ptglab.audit import corrections
from ptglab.audit.corrections import Corrections, Queue

IDS, NAMES = [f"{i}.png" for i in range(6)], ["cat", "dog", "=1+1"]
GIVEN = np.array([0, 1, 0, 1, 2, 0])
ROWS = {id: row for row, id in enumerate(IDS)}
SCORE = np.array([3, 1, 9, 2, 0, 9])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "corrections.csv"


def lines(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_decision_is_a_line_of_the_file_and_on_disk_when_add_returns(path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.append(path.exists() and path.read_bytes()),
                                                     fsync(number)))  # fmt: skip
    kept = Corrections(path)
    assert not path.exists()
    kept.add("0.png", "cat", "keep", "cat")
    kept.add("1.png", "dog", "class", "=1+1")
    assert flushed[-1] == path.read_bytes()
    header, *rows = lines(path)
    assert header == ["time", "id", "given", "decision", "label"]
    assert [row[1:] for row in rows] == [["0.png", "cat", "keep", "cat"], ["1.png", "dog", "class", "'=1+1"]]
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row[0]) for row in rows)


def test_undo_cuts_the_last_line_off_and_what_counted_before_counts_again(path):
    kept = Corrections(path)
    kept.add("0.png", "cat", "keep", "cat")
    first = path.read_bytes()
    kept.add("0.png", "cat", "class", "dog")
    assert kept.of("0.png").label == "dog" and len(kept.standing()) == 1
    assert kept.undo().label == "dog" and path.read_bytes() == first and kept.of("0.png").label == "cat"
    assert kept.undo().label == "cat" and kept.undo() is None and kept.of("0.png") is None
    assert lines(path) == [["time", "id", "given", "decision", "label"]]
    kept.add("1.png", "dog", "drop")
    assert [row[1] for row in lines(path)[1:]] == ["1.png"]


def test_a_new_process_goes_on_where_it_was(path):
    kept = Corrections(path)
    for id in ("a,b.png", 'quoted "x".png', "-1.png", "né.png"):
        kept.add(id, "cat", "skip")
    again = Corrections(path)
    assert again.rows == kept.rows
    again.undo()
    again.add("last.png", "cat", "drop")
    assert [d.id for d in Corrections(path).rows] == ["a,b.png", 'quoted "x".png', "-1.png", "last.png"]


@pytest.mark.parametrize("torn", [1, 5, 30])
def test_a_line_torn_by_a_kill_is_cut_off(path, torn):
    kept = Corrections(path)
    kept.add("0.png", "cat", "keep", "cat")
    whole = path.read_bytes()
    kept.add("1.png", "dog", "keep", "dog")
    path.write_bytes(path.read_bytes()[:-torn])
    assert [d.id for d in Corrections(path).rows] == ["0.png"] and path.read_bytes() == whole


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    kept = Corrections(path)
    kept.add("0.png", "cat", "keep", "cat")
    whole = path.read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(corrections.os, "fsync", full)
        refused("the disk is full", call=kept.add)("1.png", "dog", "keep", "dog")
    assert path.read_bytes() == whole and len(kept.rows) == 1
    kept.add("1.png", "dog", "keep", "dog")
    assert [d.id for d in Corrections(path).rows] == ["0.png", "1.png"]


def test_what_others_did_to_the_file_is_said(path):
    kept = Corrections(path)
    kept.add("0.png", "cat", "keep", "cat")
    other = Corrections(path)
    other.add("1.png", "dog", "keep", "dog")
    refused("corrections.csv", "changed", call=kept.add)("2.png", "cat", "drop")
    refused("corrections.csv", call=kept.undo)()
    path.unlink()
    refused("corrections.csv", call=other.undo)()


@pytest.mark.parametrize("line", [b"now,a,cat,burn,\n", b"now,a,cat\n", b"now,a,cat,keep,\xff\n", None])
def test_another_file_is_refused_and_left(path, line):
    content = b"id,label\n" if line is None else b"time,id,given,decision,label\n" + line
    path.write_bytes(content)
    refused(str(path), "time,id" if line is None else "line 2", call=Corrections)(path)
    assert path.read_bytes() == content


def test_names_on_two_lines_and_unknown_decisions_are_refused(path):
    kept = Corrections(path)
    refused("a\\nb", call=kept.add)("a\nb", "cat", "drop")
    refused("'kepp'", "'keep'", call=kept.add)("a", "cat", "kepp")
    assert not path.exists()


def test_labels_are_applied_and_the_given_ones_stay(path):
    kept, before = Corrections(path), GIVEN.copy()
    for id, given, decision, label in [
        ("0.png", "cat", "suggestion", "dog"), ("1.png", "dog", "keep", "dog"), ("2.png", "cat", "drop", ""),
        ("3.png", "dog", "skip", ""), ("4.png", "=1+1", "class", "cat"), ("0.png", "cat", "class", "=1+1"),
    ]:  # fmt: skip
        kept.add(id, given, decision, label)
    labels, stay = Corrections(path).applied(ROWS, GIVEN, NAMES)
    assert labels.tolist() == [2, 1, 0, 1, 0, 0] and stay.tolist() == [True, True, False, True, True, True]
    assert (before == GIVEN).all()


@pytest.mark.parametrize("wrong", [("9.png", "cat", "cat"), ("0.png", "dog", "dog"), ("0.png", "cat", "bird")])
def test_decisions_on_another_set_are_refused(path, wrong):
    kept = Corrections(path)
    kept.add(wrong[0], wrong[1], "class", wrong[2])
    refused(str(path), wrong[0], call=kept.applied)(ROWS, GIVEN, NAMES)
    refused(str(path), wrong[0], call=Queue)(kept, IDS, GIVEN, NAMES)


@pytest.fixture
def queue(path) -> Queue:
    """Rows 4, 1, 3, 0, in that order."""
    queue = Queue(Corrections(path), IDS, GIVEN, NAMES)
    queue.order(SCORE, np.array([True, True, False, True, True, False]))
    return queue


def test_the_most_suspicious_comes_first_and_each_decision_leads_on(queue):
    assert queue.row == 4 and queue.progress() == "0 of 4, 0 changed"
    assert queue.decide("class", 0).label == "cat" and queue.row == 1
    queue.place = 2  # what is passed over comes after the end
    queue.decide("skip")
    queue.decide("drop")
    assert queue.row == 1 and queue.progress() == "3 of 4, 2 changed, 1 skipped"
    queue.decide("keep")
    queue.place = 0  # deciding again counts once
    queue.decide("keep")
    assert queue.progress() == "4 of 4, 1 changed, 1 skipped" and len(queue.corrections.rows) == 5


def test_undo_goes_back_to_the_picture_and_counts_back(queue):
    queue.decide("drop")
    queue.decide("class", 0)
    assert queue.undo().id == "1.png" and queue.row == 1 and queue.progress() == "1 of 4, 1 changed"
    queue.undo()
    assert queue.undo() is None and queue.row == 4 and queue.progress() == "0 of 4, 0 changed"


def test_states_show_what_they_say_and_progress_is_of_all_that_are_chosen(queue):
    queue.decide("drop")
    queue.decide("skip")
    chosen, shown = queue.chosen, {}
    for state in Queue.STATES:
        queue.order(SCORE, chosen, state)
        shown[state] = queue.rows.tolist()
        assert queue.progress() == "2 of 4, 1 changed, 1 skipped"
    assert shown == {"all": [4, 1, 3, 0], "undecided": [3, 0], "changed": [4], "skipped": [1]}
    refused("unknown state 'done'", call=queue.order)(SCORE, chosen, "done")


def test_a_restart_goes_on_after_the_last_decision(queue, path):
    queue.place = 1
    queue.decide("keep")
    again = Queue(Corrections(path), IDS, GIVEN, NAMES)
    again.order(SCORE, queue.chosen)
    assert again.row == 3 and again.progress() == "1 of 4, 0 changed"
    again.order(SCORE, np.zeros(6, bool))
    assert again.row is None
    refused("nothing to decide", call=again.decide)("keep")


def test_a_decision_after_many_writes_its_own_line_only(path, monkeypatch):
    """The file is neither written anew nor read again, so that a decision costs the same after 20,000 as after ten."""
    ids = [f"{i:05}" for i in range(20_060)]
    rows = "".join(f"2026-01-01T00:00:00.000Z,{id},a,keep,a\n" for id in ids[:20_000])
    path.write_text("time,id,given,decision,label\n" + rows)
    queue = Queue(Corrections(path), ids, np.zeros(len(ids), np.int64), ["a", "b"])
    queue.order(np.arange(len(ids)), np.ones(len(ids), bool))
    before = path.stat()
    monkeypatch.setattr(corrections.files, "write", None)
    for _ in range(50):
        queue.decide("class", 1)
    after = path.stat()
    assert queue.row == 20_050 and after.st_ino == before.st_ino
    assert after.st_size - before.st_size == 50 * len("2026-01-01T00:00:00.000Z,20000,a,class,b\n")
