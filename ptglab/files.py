"""Files: written whole or not at all, the system's refusals in one line, one process at a time in a folder."""

import csv
import errno
import io
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout

from ptglab.errors import InputError
from ptglab.text import escape_formula, printable, unescape_formula

if TYPE_CHECKING:
    import pandas as pd

GO_ON = "run again, it goes on where it was"
REFUSALS = {  # what a person can mend, in their words
    errno.ENOSPC: f"the disk is full; make room and {GO_ON}",
    errno.EDQUOT: f"your share of the disk is used up; make room and {GO_ON}",
    errno.EFBIG: f"a file would be larger than is allowed there; raise the limit and {GO_ON}",
    errno.EROFS: "it can only be read; give a folder that can be written",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.EISDIR: "a folder stands where a file should; delete it, or give another",
    errno.ELOOP: "a link stands where a file should; delete it, or give another folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Permission denied; give another folder, or change its permissions"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder should; delete it, or give another"),
}
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # file systems without locks
MAX_TABLE = 1 << 28  # bytes of a CSV or a list of labels: millions of lines
MAX_JSON = 1 << 24  # bytes of a file of JSON; ours have some kilobytes
MAX_ENTRIES = 1_000_000  # files and folders in the folder of a run or a sweep
OURS = re.compile(r"\..+\.\d+\.ptglab\.tmp")  # what `write` writes until it is whole
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor waiting for the other end of a pipe
PATIENCE = 5.0  # seconds for a kernel whose parent was killed, which it looks for every second


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write `path` whole or not at all: `save` writes a file beside it, which is flushed and takes its place.

    Until then an earlier file stays. Raises InputError if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.ptglab.tmp")
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


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    """Write `table` without its index, in UTF-8; every text is quoted and none is a formula to a spreadsheet.

    `read_csv` reads it back, and so does `text.unescape_formula` of what `csv` reads.
    """
    safe = table.map(lambda value: escape_formula(value) if isinstance(value, str) else value)
    options = {"index": False, "quoting": csv.QUOTE_NONNUMERIC, "encoding": "utf-8", "errors": "backslashreplace"}
    write(path, lambda temporary: safe.to_csv(temporary, lineterminator="\n", **options))


def read(path: Path, most: int = MAX_TABLE) -> bytes:
    """Return the bytes of a file. Raises InputError for a link, a pipe or a device, and for more than `most` bytes."""
    with writing(path.parent), open(path, "rb", opener=own) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no plain file: delete it")
        if status.st_size > most:
            raise InputError(f"{path} has {status.st_size:,} bytes, more than the {most:,} that it may have")
        return file.read()


def read_json(path: Path, most: int = MAX_JSON) -> object:
    """Return what a file of JSON holds. Raises ValueError if it holds none, and InputError as `read` does."""
    try:
        return json.loads(read(path, most))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_csv(path: Path) -> "pd.DataFrame":
    """Return a table that `write_csv` wrote: texts without their escapes, gaps as NaN.

    Raises InputError for a file that is no table, or not a plain file.
    """
    import pandas as pd

    try:
        table = pd.read_csv(io.BytesIO(read(path)), dtype={"commit": str})  # a commit may be all digits
    except (ValueError, OverflowError) as error:  # pandas' own errors are ValueErrors
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no table ({why}): delete it and run again") from None
    return table.map(lambda value: unescape_formula(value) if isinstance(value, str) else value)


def own(path: str, flags: int) -> int:
    """Open a file as `open` does that is given this as its opener, but follow no link and wait for no pipe."""
    return os.open(path, flags | NO_LINK, 0o666)


def check_plain(folder: Path) -> None:
    """Raise InputError unless everything below `folder` is a plain file or a folder, and there is not too much of it.

    A run folder may come from anybody: through a link in it, a run would write into files elsewhere, and a pipe would
    keep it waiting. `folder` itself may be a link, or missing.
    """
    waiting, count = [folder], 0
    while waiting:
        with suppress(FileNotFoundError, NotADirectoryError), writing(folder), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    what = "a link" if entry.is_symlink() else "no plain file"
                    raise InputError(f"{entry.path} is {what}, and a run would write or read through it: delete it")
                if count > MAX_ENTRIES:
                    raise InputError(f"{folder} holds more than {MAX_ENTRIES:,} files: give a folder of its own")


@contextmanager
def writing(folder: str | Path, every: bool = False) -> Iterator[None]:
    """Raise InputError for the system's errors in the block that a person can mend; they concern `folder`.

    `every`: for all of the system's errors, where the block does nothing but write what a person has named.
    """
    try:
        yield
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors writes it
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number not in REFUSALS and not (every and isinstance(error, OSError)):
            raise
        raise InputError(f"cannot write {folder}: {REFUSALS.get(number) or error.strerror or error}") from None


def allocate(file: IO | int, size: int) -> None:
    """Reserve `size` bytes of the disk for an open file, so that a mapping of it cannot fail later with SIGBUS."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file if isinstance(file, int) else file.fileno(), 0, size)


def small_enough(table: Path) -> Path:
    """Return `table`, the path of a CSV or list. Raises InputError if it is larger than MAX_TABLE."""
    if (size := os.path.getsize(table)) > MAX_TABLE:
        raise InputError(f"{table} has {size:,} bytes, more than the {MAX_TABLE:,} that a list of labels may have")
    return table


def drop_torn(folder: Path) -> None:
    """Delete what `write` left half-written below `folder` when it was killed; nobody else may be writing there.

    Nothing below a folder inside it that has a lock of its own: another process may be at work there.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not os.path.lexists(os.path.join(place, name, ".lock"))]
        for name in filter(OURS.fullmatch, names):
            with suppress(OSError):
                os.unlink(os.path.join(place, name))


def lock(folder: Path, what: str, patience: float = 0.0, shared: bool = False) -> AbstractContextManager:
    """Lock `folder` now, until the `with` block around what is returned ends, or this process.

    Raises InputError, naming the holder, if another `what` (also of this process, unless it is `shared` there) holds it
    for longer than `patience` seconds. Where the file system has no locks, the folder is not locked.
    """
    held = FileLock(folder / ".lock", thread_local=False, fallback_to_soft=False, is_singleton=shared)
    holder = folder / ".lock.txt"  # beside the lock itself, which may be truncated
    if held.is_locked and not Path(held.lock_file).exists():  # the folder was deleted and made anew
        held.release(force=True)
    with writing(folder):
        try:
            locked = held.acquire(timeout=patience)
        except Timeout:
            name = "its name is lost"
            with suppress(OSError, InputError):
                name = printable(read(holder, 1000).decode(errors="replace").strip())
            raise InputError(f"another {what} is at work in {folder}: {name}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locked = nullcontext()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with open(holder, "w", opener=own) as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
    return locked


def hold(folder: Path, what: str) -> AbstractContextManager:
    """Lock `folder` for as long as what is returned is kept; the same process may hold it several times.

    Raises InputError if another process holds it for longer than PATIENCE.
    """
    return lock(folder, what, PATIENCE, shared=True)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
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
