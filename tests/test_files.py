"""Files: whole or not at all, refusals in one line, and one process at a time in a folder."""

import errno
import math
import multiprocessing
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from expected import refused

from ptglab import files
from ptglab.errors import InputError

# ---- atomic writing


@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "file.txt"
    if before:
        path.write_text(before)

    def half(temporary):
        temporary.write_text("ne")
        raise RuntimeError("some bug")

    with pytest.raises(RuntimeError, match="some bug"):
        files.write(path, half)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([("file.txt", "old")] if before else [])


def test_a_write_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    """First the content, then the entry in the folder: a power cut leaves the old file or the new one."""
    order = []
    monkeypatch.setattr(
        os, "fsync", lambda number: order.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
    )
    monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: (order.append("replace"), replace(a, b)))
    files.write(tmp_path / "file.txt", lambda temporary: temporary.write_text("new"))
    assert order == [f".file.txt.{os.getpid()}.ptglab.tmp", "replace", tmp_path.name]


def test_what_a_killed_write_left_is_dropped(tmp_path):
    (tmp_path / "arrays").mkdir()
    (tmp_path / "inner").mkdir()
    torn = [tmp_path / ".params.json.17.ptglab.tmp", tmp_path / "arrays" / ".probs.npy.17.ptglab.tmp"]
    whole = [tmp_path / name for name in ("params.json", ".lock", "a.tmp", ".draft.tmp", ".draft.17.tmp")]
    whole += [tmp_path / "inner" / name for name in (".lock", ".params.json.18.ptglab.tmp")]  # another's, at work there
    for path in torn + whole:
        path.write_text("x")
    files.drop_torn(tmp_path)
    assert not any(path.exists() for path in torn) and all(path.exists() for path in whole)


# ---- what the system says


@pytest.mark.parametrize("number", files.REFUSALS, ids=lambda n: errno.errorcode[n])
def test_what_a_person_can_mend_is_one_line_with_the_mend(tmp_path, number):
    for error in (OSError(number, "said"), RuntimeError(f"Error while serializing: said (os error {number})")):
        with (
            pytest.raises(InputError, match=re.escape(f"cannot write {tmp_path}: ")) as caught,
            files.writing(tmp_path),
        ):
            raise error
        assert "\n" not in str(caught.value) and ";" in str(caught.value)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), ValueError("os error"), KeyError("x"), OSError("x")]
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, files.writing(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.EMFILE], ids=lambda n: errno.errorcode[n])
def test_where_a_person_named_what_is_written_every_error_of_the_system_is_one_line(tmp_path, number):
    with (
        pytest.raises(InputError, match=f"cannot write .*: {os.strerror(number)}$"),
        files.writing(tmp_path, every=True),
    ):
        raise OSError(number, os.strerror(number))
    with pytest.raises(KeyError), files.writing(tmp_path, every=True):
        raise KeyError("x")


def test_place_on_the_disk_is_taken(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        files.allocate(file, 100_000)
        files.allocate(file, 0)
    assert (tmp_path / "file").stat().st_size == 100_000
    if sys.platform.startswith("linux"):
        assert (tmp_path / "file").stat().st_blocks * 512 >= 100_000


def test_a_table_comes_back_as_it_was(tmp_path):
    texts = ["né, plain", "=1+1", "'=x", "a;=1+1;'-2", None, 'a "b"\nc']
    table = pd.DataFrame({"epoch": range(6), "accuracy": [0.1 + 0.2, np.nan, 1, 2, 3, 4], "recipe": texts})
    table.index += 7
    files.write_csv(tmp_path / "a.csv", table)
    assert (tmp_path / "a.csv").read_text().splitlines()[:3] == [
        '"epoch","accuracy","recipe"', '0,0.30000000000000004,"né, plain"', '1,"","\'=1+1"']  # fmt: skip
    back = files.read_csv(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(back, table.reset_index(drop=True), check_exact=True, check_dtype=False)


# ---- locks


def taken(folder: Path, message) -> None:
    """Hold a folder in a process of its own until that is killed; say what came of it."""
    files.PATIENCE = 0
    try:
        held = files.hold(folder, "process")
        message.send("held")
    except InputError as error:
        message.send(str(error))
    message.recv()
    del held


@pytest.fixture
def holder(tmp_path):
    """Return a function that starts a process which tries to hold a folder, and what it says."""
    started, context = [], multiprocessing.get_context("spawn")

    def start():
        here, there = context.Pipe()
        process = context.Process(target=taken, args=(tmp_path, there))
        process.start()
        started.append((process, here))
        return process, here.recv()

    yield start
    for process, _ in started:
        process.kill()
        process.join()


def test_a_second_process_is_told_who_holds_a_folder_and_a_dead_ones_lock_is_free(tmp_path, holder):
    first, said = holder()
    assert said == "held"
    line = f"another process is at work in {re.escape(str(tmp_path))}: process {first.pid} on .+, since .+"
    assert re.fullmatch(line, holder()[1])
    waiting = threading.Thread(target=first.kill)
    waiting.start()
    with files.lock(tmp_path, "process", math.inf):  # who has patience gets it once the holder is dead
        assert holder()[1].startswith("another process is at work")
    waiting.join()
    assert holder()[1] == "held"


def test_a_process_does_not_lock_itself_out(tmp_path):
    held = [files.hold(tmp_path, "process") for _ in range(3)]
    for path in list(tmp_path.iterdir()):  # as when the folder is deleted and the notebook executed again
        path.unlink()
    held.append(files.hold(tmp_path, "process"))
    refused("another sweep is at work", f"process {os.getpid()}", call=files.lock)(tmp_path, "sweep")
    held.clear()
    with files.lock(tmp_path, "sweep"):
        pass


def test_where_the_file_system_knows_no_locks_work_goes_on(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    for _ in range(2):
        with files.lock(tmp_path, "process"):
            files.hold(tmp_path, "process")


def test_a_folder_that_cannot_be_written_cannot_be_locked(tmp_path, monkeypatch):
    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    refused(f"cannot write {tmp_path}: it can only be read", call=files.lock)(tmp_path, "process")
