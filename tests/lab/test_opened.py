"""Run folders that come from anybody: refused in one line or as they were, nothing outside touched, no waiting."""

import shutil
import signal
from contextlib import contextmanager

import mutated
import numpy as np
import pandas as pd
import pytest
from expected import refused

from ptglab import files
from ptglab.audit import reopen
from ptglab.errors import InputError
from ptglab.lab import runs, spec, sweeps
from ptglab.train import checkpoints

PARAMS = dict(dataset="digits", labels="", subset=0, seed=0, image_size=0, budget="quick", detector="knn", epochs=3)


@pytest.fixture(scope="module")
def sent(tmp_path_factory, few):
    """A whole run folder."""
    run = runs.start(tmp_path_factory.mktemp("sent") / "run", **PARAMS)
    run.follow([{"epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)], "t", 3)
    run.save_results([{"seed": 0, "dataset": "digits", "detector": "knn", "f1": 0.5, "accuracy_last": 0.5}])
    for name, array in dict(ids=few.ids, labels_given=few.labels_given, labels_true=few.labels_given).items():
        run.save_array(name, np.array(array))
    names = np.array(few.class_names)[few.labels_given]
    table = {"id": few.ids, "given": names, "suggested": names, "score": 0.5, "flagged": False}
    run.save_table("suspects", pd.DataFrame(table))
    files.write_json(run.path / "summary.json", {"detector": "knn", "images": len(few)})
    run.stage("features").save_array("features", np.ones((len(few), 2), np.float32))
    run.stage("features").finish()
    (run.path / "notebook.ipynb").write_text("{}")
    files.write_json(run.path / spec.MARK, spec.left(run.path))
    sweeps._note(run.path, sweeps.Event(CELL, "finished", 3.0))
    return run.path


CELL = spec.Cell(".", "02_pretrain", {"seed": 0})


@contextmanager
def answered():
    """Fail where something is waited for that never comes, as the other end of a pipe."""

    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def openings(path, few):
    """Yield the ways in which a run folder is opened, as (name, function)."""
    yield "params", lambda: runs.Run(path).params
    yield "records", lambda: runs.Run(path).records().to_dict("records")
    yield "results", lambda: runs.Run(path).results().iloc[:, :25].fillna(-1).to_dict("records")
    yield "labels", lambda: {n: a.tolist() for n, a in runs.Run(path).labels(few.ids, "digits").items()}
    yield "features", lambda: runs.Run(path / "features").array("features").tolist()
    yield "findings", lambda: reopen.read(path).suspects("knn").score.tolist()
    yield "estimate", lambda: sweeps.estimate([spec.Cell("other", "02_pretrain", {})], path, 1)
    yield "sweep", lambda: [event.state for event in sweeps.run([CELL], path)]
    yield "start", lambda: runs.start(path, **PARAMS).params
    yield "follow", lambda: runs.start(path, **PARAMS).follow([{"epoch": 4}], "t", 3)


def test_opening_mutated_run_folders(sent, few, tmp_path, monkeypatch):
    """200 of them, each by every way: refused in a line, mended, or what it was; see `mutated`."""
    monkeypatch.setattr(reopen.data, "load", lambda *args, **options: few)
    monkeypatch.setattr(sweeps, "execute", lambda *_: (1.0, "", ""))
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "0"})  # asking git takes most of the time
    expected, wrong, refusals = {}, [], 0
    shutil.copytree(sent, tmp_path / "whole")
    for name, opening in openings(tmp_path / "whole", few):
        expected[name] = opening()
    (outside := tmp_path / "outside").mkdir()
    (outside / "kept.txt").write_text("kept")
    for number in range(mutated.MANY):
        shutil.copytree(sent, path := tmp_path / "run")
        what = mutated.mutate(number, path, outside)
        before, count = mutated.state(outside), refusals
        for name, opening in openings(path, few):
            try:
                with answered():
                    found = opening()
            except InputError as error:
                refusals += 1
                if "\n" in str(error):
                    wrong.append((number, what, name, "more than a line"))
            except Exception as error:
                wrong.append((number, what, name, repr(error)[:200]))
            else:
                mended = name == "records" and found == expected[name][: len(found)]
                said = name in ("sweep", "estimate", "follow")  # it runs again; nobody knows; it went on
                if repr(found) != repr(expected[name]) and not mended and not said:
                    wrong.append((number, what, name, f"{found!r:.200}"))
        if mutated.state(outside) != before:
            wrong.append((number, what, "", "something outside was written"))
        if what.startswith(("link", "new link", "pipe")) and refusals - count < 8:
            wrong.append((number, what, "", "it was opened"))
        shutil.rmtree(path)
    assert not wrong, "\n".join(map(str, [len(wrong), *wrong]))
    assert refusals > 3 * mutated.MANY  # most changes concern one way of opening alone


@pytest.mark.parametrize("epoch", ["4", "-1", "99999999999999999999"])
def test_a_checkpoint_of_a_longer_run_does_not_count_as_finished(tmp_path, epoch):
    run = runs.start(tmp_path)
    checkpoints.write_tensors(run.checkpoint, {}, {"epoch": epoch})
    refused(str(run.checkpoint), f"epoch {epoch}", call=run.follow)(iter([{"epoch": 3}]), "t", 3)
    checkpoints.write_tensors(run.checkpoint, {}, {"epoch": "3"})
    run.follow([], "t", 3)


def test_what_a_refused_start_did_not_make_stays(tmp_path):
    mine, another = tmp_path / "mine", tmp_path / "another"
    run = runs.start(mine, **PARAMS)
    runs.discard(mine)
    del run
    assert not mine.exists()
    runs.start(another, **PARAMS)
    (another / "failed-report.ipynb").write_text("what is named in the message")
    runs.discard(another)
    assert [path.name for path in another.iterdir()] == ["failed-report.ipynb"]


@pytest.mark.parametrize("gone", ["results.csv", "notebook.ipynb", spec.MARK])
@pytest.mark.parametrize("how", ["missing", "empty", "broken"])
def test_a_finished_cell_that_lost_what_it_left_runs_again_and_that_is_said(sent, tmp_path, monkeypatch, gone, how):
    shutil.copytree(sent, tmp_path / "run")
    cell = tmp_path / "run" / gone
    match how:
        case "missing":
            cell.unlink()
        case "empty":
            cell.write_bytes(b"")
        case "broken":
            cell.write_bytes(cell.read_bytes()[:-2])
    monkeypatch.setattr(sweeps, "execute", lambda *_: (0.0, "ran", ""))
    states = [event.state for event in sweeps.run([CELL], tmp_path / "run")]
    assert states == (["started", "failed"] if (gone, how) == ("notebook.ipynb", "missing") else
                      ["again", "started", "failed"])  # fmt: skip
