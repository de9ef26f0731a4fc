"""Files: written whole or not at all, the system's refusals in one line, one process at a time in a folder."""

import csv
import errno
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pandas as pd

from ptglab.errors import InputError
from ptglab.text import escape_formula

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None

GO_ON = "run again, it goes on where it was"
REFUSALS = {  # what a person can mend, in their words
    errno.ENOSPC: f"the disk is full; make room and {GO_ON}",
    errno.EDQUOT: f"your share of the disk is used up; make room and {GO_ON}",
    errno.EFBIG: f"a file would be larger than is allowed there; raise the limit and {GO_ON}",
    errno.EROFS: "it can only be read; give a folder that can be written",
    errno.EACCES: "Permission denied; give a folder that you may write, or change its permissions",
    errno.EPERM: "it is protected; give a folder that you may write, or change its permissions",
    errno.ENOTDIR: "a file stands where a folder should; delete it, or give another folder",
    errno.EEXIST: "a file stands where a folder should; delete it, or give another folder",
}
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # said by some file systems
MAX_TABLE = 1 << 28  # bytes of a CSV or a list of labels: millions of lines
PATIENCE = 5.0  # seconds for a kernel whose parent was killed, which it looks for every second


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write a file beside `path`, flush it to disk, and put it in place in one step.

    What stands there stays until then. Raises InputError if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path.parent):
            save(temporary)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON to `path`, whole or not at all."""
    write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` without its index: UTF-8, every text quoted, none of them a formula to a spreadsheet.

    Any text comes back by `text.unescape_formula` of what `csv` or pandas (dtype=str, keep_default_na=False) reads.
    """
    texts = table.select_dtypes(exclude="number").columns
    safe = table.assign(**{c: [escape_formula(v) if isinstance(v, str) else v for v in table[c]] for c in texts})
    options = {"index": False, "quoting": csv.QUOTE_NONNUMERIC, "encoding": "utf-8", "errors": "backslashreplace"}
    write(path, lambda temporary: safe.to_csv(temporary, lineterminator="\n", **options))


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turn what the system says against writing in `folder` into InputError, where a person can mend it.

    The messages of safetensors are read, too: they hold the number of the system's error.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(said[1])
        if number not in REFUSALS:
            raise
        raise InputError(f"cannot write {folder}: {REFUSALS[number]}") from None


def allocate(file: IO | int, size: int) -> None:
    """Take `size` bytes of the disk for an open file, so that a mapping of it cannot fail later, by SIGBUS."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file if isinstance(file, int) else file.fileno(), 0, size)


def small_enough(table: Path) -> Path:
    """Return `table`, a CSV or list. Raises InputError if it is larger than MAX_TABLE."""
    if (size := os.path.getsize(table)) > MAX_TABLE:
        raise InputError(f"{table} has {size:,} bytes, more than the {MAX_TABLE:,} that a list of labels may have")
    return table


def drop_torn(folder: Path) -> None:
    """Delete what `write` left half-written below `folder` when it was killed; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def lock(folder: Path, what: str, patience: float = 0.0) -> IO:
    """Return `folder`/.lock, open and locked: the system lets go of it when it is closed or this process ends.

    Raises InputError, naming the holder, if another `what` holds it for longer than `patience` seconds. Where the
    file system knows no locks, it is not locked.
    """
    with writing(folder):
        file = open(folder / ".lock", "a+")  # noqa: SIM115 - held open for as long as it is locked
    end = time.monotonic() + patience
    while fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                file.seek(0)
                holder = file.read().strip() or "which does not say who it is"
                file.close()
                raise InputError(f"another {what} is at work in {folder}: {holder}") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            break
    with writing(folder):
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"process {os.getpid()} on {socket.gethostname()}, since {since}", file=file, flush=True)
    return file


def hold(folder: Path, what: str) -> None:
    """Lock `folder` until this process ends; again in the same process, do nothing. Raises InputError, as `lock`."""
    path = folder / ".lock"
    if path.exists() and _identity(path) in _held:
        return
    with lock(folder, what, PATIENCE) as file:
        _held[_identity(path)] = os.dup(file.fileno())  # a second hand on the same lock


_held: dict[tuple[int, int], int] = {}  # by what a file is, not its name: the folder may be deleted and made anew


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _flush(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(number)
