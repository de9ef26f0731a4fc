"""Files: whole or not at all, refusals in one line, and one process at a time in a folder."""

import errno
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

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


def test_a_write_goes_to_a_file_beside_and_takes_its_place(tmp_path):
    path, seen = tmp_path / "file.txt", []
    path.write_text("old")

    def save(temporary):
        temporary.write_text("new")
        seen.append((temporary.parent == tmp_path, path.read_text()))

    files.write(path, save)
    assert seen == [(True, "old")]
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "new")]


def test_a_write_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    """First the content, then the entry in the folder: a power cut leaves the old file or the new one."""
    order = []
    monkeypatch.setattr(
        os, "fsync", lambda number: order.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
    )
    monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: (order.append("replace"), replace(a, b)))
    files.write(tmp_path / "file.txt", lambda temporary: temporary.write_text("new"))
    assert order == [f".file.txt.{os.getpid()}.tmp", "replace", tmp_path.name]


def test_what_a_killed_write_left_is_dropped(tmp_path):
    (tmp_path / "arrays").mkdir()
    torn = [tmp_path / ".params.json.17.tmp", tmp_path / "arrays" / ".probs.npy.17.tmp"]
    whole = [tmp_path / "params.json", tmp_path / ".lock", tmp_path / "a.tmp"]
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


def test_place_on_the_disk_is_taken(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        files.allocate(file, 100_000)
        files.allocate(file, 0)
    assert (tmp_path / "file").stat().st_size == 100_000
    if sys.platform.startswith("linux"):
        assert (tmp_path / "file").stat().st_blocks * 512 >= 100_000


# ---- locks

HOLDS = """
import sys
from pathlib import Path
from ptglab import files
files.PATIENCE = float(sys.argv[2])
try:
    files.hold(Path(sys.argv[1]), "process")
except Exception as error:
    print(error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Return a function that starts a process which tries to hold a folder, and what it says first."""
    started = []

    def start(patience: float = 0):
        command = [sys.executable, "-c", HOLDS, str(tmp_path), str(patience)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        with suppress(OSError):
            process.kill()
        process.communicate()


def test_a_second_process_is_told_who_holds_a_folder_and_a_dead_ones_lock_is_free(tmp_path, holder):
    first, said = holder()
    assert said == "held"
    second, said = holder()
    assert re.fullmatch(
        f"another process is at work in {re.escape(str(tmp_path))}: process {first.pid} on .+, "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", said
    )  # fmt: skip
    assert second.wait(60) == 2
    first.kill()
    first.wait(60)
    assert holder()[1] == "held"


def test_a_process_waits_for_one_that_is_about_to_end(holder):
    first, _ = holder()
    command = f"import os, time; time.sleep(3); os.kill({first.pid}, 9)"
    with subprocess.Popen([sys.executable, "-c", command]):
        assert holder(patience=120)[1] == "held"


def test_a_process_does_not_lock_itself_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    for _ in range(3):
        files.hold(tmp_path, "process")
    (tmp_path / ".lock").unlink()  # as when the folder is deleted and the notebook executed again
    files.hold(tmp_path, "process")
    refused("another sweep is at work", f"process {os.getpid()}", call=files.lock)(tmp_path, "sweep")


def test_where_the_file_system_knows_no_locks_work_goes_on(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unknown)
    files.lock(tmp_path, "process").close()
    monkeypatch.setattr(files, "fcntl", None)
    files.lock(tmp_path, "process").close()


def test_a_folder_that_cannot_be_written_cannot_be_locked(tmp_path, monkeypatch):
    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", read_only)
    refused(f"cannot write {tmp_path}: it can only be read", call=files.lock)(Path(tmp_path), "process")
