"""From blocks of images to one array, which lies in memory or, past LARGE bytes, in a file that is mapped.

Such a set is decoded once, by processes side by side. Its file lies in a folder of its own below PTGLAB_CACHE, by
default `ptglab` in XDG_CACHE_HOME or ~/.cache, which may be deleted at any time. Blocks are marked as they are done: a
build that was killed goes on. Where the sources have changed, by name, size or time, it is built anew.
"""

import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from ptglab import files
from ptglab.data import decode
from ptglab.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used, see `decode`

LARGE = 1 << 30  # bytes of pixels above which a set is cached; decoding so many takes a minute
BLOCK = 4096  # images that are read one after the other, at most
MANY = 50_000  # images whose headers are worth starting processes for, which takes about two seconds
SMALL_PIXELS = 96 * 96  # of an image that is mostly Python overhead to decode
VERSION = 2  # of the layout of the folder, and of how images are decoded
if hasattr(mmap, "MAP_PRIVATE"):  # not on Windows; without MAP_NORESERVE Linux refuses more than it has memory for
    NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    PRIVATE = {"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
else:
    PRIVATE = {"access": mmap.ACCESS_COPY}


def root() -> Path:
    """Return the folder that caches are in: PTGLAB_CACHE, or `ptglab` in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("PTGLAB_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptglab")


def folder(source: str | Path, *choices: object) -> Path:
    """Return the folder of the cache of `source`, a file or folder, read with those choices."""
    name = os.path.abspath(source)
    digest = hashlib.sha256(json.dumps([name, *map(str, choices)]).encode()).hexdigest()
    return root() / f"{re.sub('[^A-Za-z0-9]+', '-', Path(name).stem)[:40].strip('-') or 'images'}-{digest[:16]}"


class Block(NamedTuple):
    """Images that are read one after the other; `read` yields `number` paths or open files, and can be pickled."""

    number: int
    read: Callable[[], Iterable]


def blocks(paths: Sequence[str]) -> list[Block]:
    """Return the image files `paths` in blocks."""
    step = block_size(len(paths))
    parts = (paths[start : start + step] for start in range(0, len(paths), step))
    return [Block(len(part), functools.partial(iter, part)) for part in parts]


def block_size(number: int) -> int:
    """Return how many of `number` images make a block; it depends on nothing else, so that a build can be resumed."""
    return min(BLOCK, max(16, number // 64))


def images(
    parts: list[Block], ids: Sequence[str], paths: Iterable[str | Path], place: Path,
    image_size: int | None = None, at_most: int | None = None,
) -> "tuple[Tensor, list[int], list[tuple[str, str]], list[str]]":  # fmt: skip
    """Decode the N images of `parts` in two passes: headers, then pixels straight into the one array.

    ids: what the images are called in messages; paths: the files that they come from; place: the `folder` of the cache.
    `decode.layout` says which size and channels they get. Returns (images uint8 [M, C, H, W], the M rows that were
    readable, [(id, reason)] of the others, notes on what was changed). What is written to an array that is mapped stays
    in this process. Raises InputError if no image is readable, if the disk is too small, or if a process has died.
    """
    import torch

    fingerprint = functools.cache(lambda: _fingerprint(paths, len(ids), image_size, at_most))
    plan, pixels = _read(place, fingerprint), None
    with decode.quiet():
        if not plan:
            plan = _planned(parts, ids, image_size, at_most)
            if math.prod(plan["shape"]) <= min(LARGE, decode.free_memory() / 2):
                pixels = np.empty(plan["shape"], np.uint8)
                plan = _decoded(parts, plan, pixels, ids)
        if not plan["finished"]:
            plan = _built(place, parts, ids, plan | {"fingerprint": fingerprint()})
    left_out, notes = dict(plan["reasons"]), plan["notes"]
    kept = [row for row in range(len(ids)) if row not in left_out]
    if pixels is None:
        with open(place / "pixels.npy", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, **PRIVATE)
        offset = len(mapped) - math.prod(plan["shape"])  # behind NumPy's header
        pixels = np.frombuffer(mapped, np.uint8, offset=offset).reshape(plan["shape"])
        notes = [*notes, f"pixels are kept in {place} and read from there"]
    broken = [(ids[row], reason) for row, reason in left_out.items()]
    return torch.from_numpy(pixels[: len(kept)]), kept, broken, notes


def _planned(parts: list[Block], ids: Sequence[str], image_size: int | None, at_most: int | None) -> dict:
    """Read all headers, and return the plan of a build: a dictionary that JSON can hold.

    shape: of the array, with a row for each image that has a header; reasons: [(row, why it cannot be read)]; notes;
    small: whether an image is; finished: whether it is built.
    """
    arguments, sizes = [(part.read,) for part in parts], [part.number for part in parts]
    found = _in_parallel(_headers, arguments, sizes, "reading headers", processes=len(ids) > MANY)
    rows = [header for part in found for header in part]
    reasons = [(row, header) for row, header in enumerate(rows) if isinstance(header, str)]
    _check_any(len(rows) - len(reasons), reasons, ids)
    table = np.array([header for header in rows if not isinstance(header, str)], np.int64)
    shape, notes = decode.layout(table, image_size, at_most)
    small = bool(table[:, :2].prod(1).mean() <= SMALL_PIXELS)
    return {"shape": [len(table), *shape], "reasons": reasons, "notes": notes, "small": small, "finished": False}


def _built(place: Path, parts: list[Block], ids: Sequence[str], plan: dict) -> dict:
    """Build in `place` by `plan`, or go on with a build, or wait for another process; return the finished plan."""
    with _alone(place):
        before, pixels, done = _read(place, lambda: plan["fingerprint"]), place / "pixels.npy", place / "done"
        if before.get("finished"):
            return before
        if not before:  # nothing, or of other sources, or pixels that were being moved when it was killed
            for path in place.iterdir():
                if not path.name.startswith(".lock"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            done.mkdir()
            decode.allocate(plan["shape"], pixels)
            files.write_json(place / "plan.json", plan)
        files.drop_torn(place)
        plan = _decoded(parts, before or plan, pixels, ids, done)
        files.write_json(place / "plan.json", plan)
        shutil.rmtree(done)
        return plan


def _decoded(
    parts: list[Block], plan: dict, into: np.ndarray | Path, ids: Sequence[str], marks: Path | None = None
) -> dict:
    """Decode all blocks, and move the rows that failed out of the way; return the finished plan.

    into: the array, filled by threads (by one, if the images are small), or its file, filled by processes; then blocks
    that have a mark are done. Measured on two cores, a PNG of 32 x 32 takes 100 us in one thread, 135 in two, 59 in two
    processes (Python's lock is held most of the time); a JPEG of 500 x 375 shrunk to 224 takes 2.3 ms, 1.2 and 1.5.
    """
    readable = np.ones(len(ids), bool)
    readable[[row for row, _ in plan["reasons"]]] = False
    places = np.where(readable, readable.cumsum() - 1, -1)
    starts = np.cumsum([0, *(part.number for part in parts)]).tolist()
    failed = {int(mark.stem): json.loads(mark.read_bytes()) for mark in marks.glob("*.json")} if marks else {}
    left = [i for i in range(len(parts)) if i not in failed]
    arguments = [(parts[i].read, starts[i], places[starts[i] : starts[i + 1]], into) for i in left]
    sizes, jobs = [parts[i].number for i in left], 1 if plan["small"] and not marks else None
    for i, found in zip(left, _in_parallel(_pixels, arguments, sizes, "decoding", bool(marks), jobs), strict=True):
        failed[i] = found
        if marks:
            files.write_json(marks / f"{i}.json", found)
    reasons = sorted(tuple(pair) for found in [plan["reasons"], *failed.values()] for pair in found)
    rows = np.setdiff1d(np.flatnonzero(readable), [row for row, _ in reasons])
    _check_any(len(rows), reasons, ids)
    if len(rows) < readable.sum():
        if marks:
            (marks.parent / "plan.json").unlink()  # a build that is killed now begins anew
        _compact(np.lib.format.open_memmap(into, "r+") if marks else into, places[rows])
    return plan | {"reasons": reasons, "finished": True}


def _compact(pixels: np.ndarray, rows: np.ndarray) -> None:
    """Move `rows`, int64 [M] ascending, of `pixels` [N, ...] to the front: a copy might not fit into memory."""
    step = max(1, (1 << 26) // pixels[0].nbytes)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        pixels[start : start + len(part)] = pixels[part]
    if isinstance(pixels, np.memmap):
        pixels.flush()


def _in_parallel(
    task: Callable, arguments: list[tuple], sizes: list[int], title: str, processes: bool, jobs: int | None = None
) -> Iterator:
    """Yield task(*arguments[0]) and so on, from as many `jobs` as torch has threads unless said.

    A progress bar counts `sizes` once it takes longer. Raises InputError if a process has died.
    """
    import torch
    from joblib import Parallel, delayed

    jobs = min(jobs or torch.get_num_threads(), max(1, len(sizes)))
    processes = processes and jobs > 1
    options = {"backend": "loky", "idle_worker_timeout": 10} if processes else {"backend": "threading"}
    run = Parallel(jobs, return_as="generator", max_nbytes=None, **options)
    with tqdm(total=sum(sizes), desc=title, unit=" images", delay=3, leave=False) as bar:
        try:
            task = functools.partial(_quietly, task) if processes else task  # filters of warnings are not a thread's
            results = run(delayed(task)(*given) for given in arguments)
            for size, result in zip(sizes, results, strict=True):
                bar.update(size)
                yield result
        except BrokenExecutor as error:
            why = str(error).partition("\n")[0][:200]
            raise InputError(f"a process that decodes images has died: {why}; {files.GO_ON}") from None


def _quietly(task: Callable, *arguments: object) -> list:
    with decode.quiet():
        return task(*arguments)


def _headers(read: Callable) -> list[tuple[int, int, bool, bool] | str]:
    return [decode.header(image) for image in read()]


def _pixels(read: Callable, first: int, places: np.ndarray, into: np.ndarray | Path) -> list[tuple[int, str]]:
    """Decode the images of a block whose place is not negative; return [(row, why it failed)], counted from `first`."""
    pixels = np.lib.format.open_memmap(into, "r+") if isinstance(into, Path) else into
    pairs = zip(read(), places, strict=True)
    failed = [(first + i, why) for i, (image, place) in enumerate(pairs)
              if place >= 0 and (why := decode.put(image, pixels[place]))]  # fmt: skip
    if isinstance(into, Path):
        pixels.flush()
    return failed


def _check_any(readable: int, reasons: list[tuple[int, str]], ids: Sequence[str]) -> None:
    if not readable:
        row, reason = reasons[0]
        raise InputError(f"none of the {len(ids)} images can be read, the first: '{ids[row]}' ({reason})")


def _fingerprint(paths: Iterable[str | Path], *choices: object) -> str:
    """Return what changes when a source does: hex SHA-256 of the names, sizes and times of `paths` and of `choices`."""
    digest = hashlib.sha256(json.dumps([VERSION, *choices]).encode())
    for path in paths:
        try:
            status = os.stat(path)
            line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError as error:  # it has vanished since it was listed: it will be listed as unreadable
            line = f"{path}\0{error.errno}\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Hold the lock of `place`, made if need be; wait, and say so, while another process builds it."""
    try:
        with files.writing(place):
            place.mkdir(parents=True, exist_ok=True)
        try:
            lock = files.lock(place, "process")
        except InputError as error:
            print(f"{error}; waiting for its cache of pixels", file=sys.stderr)
            lock = files.lock(place, "process", math.inf)
        with lock:
            yield
    except InputError as error:
        raise InputError(f"{error} (the cache of pixels: PTGLAB_CACHE names another folder for it)") from None


def _read(place: Path, fingerprint: Callable[[], str]) -> dict:
    """Return the plan of a build in `place`, finished or not; nothing if there is none, or one of other sources."""
    try:
        plan = json.loads((place / "plan.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return plan if plan.get("fingerprint") == fingerprint() else {}
