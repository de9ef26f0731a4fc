"""Blocks of images become one array, in memory or, past LARGE bytes, in a file that is mapped.

Such a set is decoded once, by processes side by side. Its file lies in a folder of its own below PTGLAB_CACHE, by
default `ptglab` in XDG_CACHE_HOME or ~/.cache, which may be deleted at any time. It is built anew if the sources have
changed, by name, size or time, or if a build was killed.
"""

import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
MANY = 50_000  # images whose headers are worth starting processes for, which takes about two seconds
SMALL_PIXELS = 96 * 96  # of an image that is mostly Python overhead to decode
AHEAD = 1  # batches that wait, beside one a thread, until they are asked for
VERSION = 4  # of the layout of the folder, and of how images are decoded
PRIVATE = {"access": mmap.ACCESS_COPY}  # a mapping: what is written to it stays in this process
if sys.platform == "linux":  # which refuses one of more than it has memory for, unless told to reserve none
    PRIVATE = {"flags": mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000),
               "prot": mmap.PROT_READ | mmap.PROT_WRITE}  # fmt: skip


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


class Originals(NamedTuple):
    """The files that the N images of a set were decoded from: images `rows`, int64 [N], rising, of those in `parts`.

    scale: what the numbers of more than eight bits mean, see `decode.scale`.
    """

    parts: list[Block]
    rows: np.ndarray
    scale: decode.Scale | None = None

    def read(self) -> Iterator:
        """Yield N paths or open files, one after the other; blocks without any are not opened."""
        ends = np.cumsum([part.number for part in self.parts])
        chosen = np.zeros(ends[-1], bool)
        chosen[self.rows] = True
        for part, own in zip(self.parts, np.split(chosen, ends[:-1]), strict=True):
            if own.any():
                yield from itertools.compress(part.read(), own)


def stream(pictures: Iterable, ids: Sequence[str], size: int, batch_size: int, *how: object) -> Iterator[np.ndarray]:
    """Yield the N `pictures` (paths, open files or arrays) as uint8 [B, 3, size, size]; `how` goes to `decode.put`.

    There are at most AHEAD batches more than threads in memory. Raises InputError that names an image which changed.
    """
    import torch

    def decoded(part: list[tuple]) -> np.ndarray:
        pixels = np.empty((len(part), 3, size, size), np.uint8)
        for (id, picture), into in zip(part, pixels, strict=True):
            if reason := decode.put(picture, into, *how):
                raise InputError(f"image '{id}' {reason}: it has changed since it was loaded; run again")
        return pixels

    missing = itertools.repeat(io.BytesIO())
    named, waiting = zip(ids, itertools.chain(pictures, missing), strict=False), deque()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, decode.quiet():
        while part := list(itertools.islice(named, batch_size)):
            waiting.append(pool.submit(decoded, part))
            if len(waiting) >= torch.get_num_threads() + AHEAD:
                yield waiting.popleft().result()
        yield from (job.result() for job in waiting)


def blocks(paths: Sequence[str]) -> list[Block]:
    """Return the image files `paths` in blocks."""
    step = block_size(len(paths))
    parts = (paths[start : start + step] for start in range(0, len(paths), step))
    return [Block(len(part), functools.partial(iter, part)) for part in parts]


def block_size(number: int) -> int:
    """Return how many of `number` images make a block."""
    return min(4096, max(16, number // 64))


def images(
    parts: list[Block], ids: Sequence[str], paths: Iterable[str | Path], place: Path,
    image_size: int | None = None, at_most: int | None = None,
) -> "tuple[Tensor, Originals, list[tuple[str, str]], list[str]]":  # fmt: skip
    """Decode the N images of `parts` in two passes: headers, then pixels straight into the one array.

    ids: what the images are called in messages; paths: the files that they come from; place: the `folder` of the cache.
    `decode.layout` says which size and channels they get. Returns (images uint8 [M, C, H, W], the originals of the M
    that were readable, [(id, reason)] of the others, notes). What is written to an array that is mapped stays in this
    process. Raises InputError if no image is readable, if the disk is too small, or if a process has died.
    """
    import torch

    fingerprint, pixels = _fingerprint(paths, len(ids), image_size, at_most), None
    plan = _read(place, fingerprint)
    with decode.quiet():
        if not plan:
            plan = _planned(parts, ids, image_size, at_most) | {"fingerprint": fingerprint}
            if math.prod(plan["shape"]) > min(LARGE, decode.free_memory() / 2):
                plan = _built(place, parts, ids, plan)
            else:
                pixels = np.empty(plan["shape"], np.uint8)
                plan = _decoded(parts, ids, plan, pixels)
    left_out, notes = dict(plan["reasons"]), plan["notes"]
    kept = np.array([row for row in range(len(ids)) if row not in left_out])
    if pixels is None:
        with open(place / "pixels.npy", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, **PRIVATE)
        offset = len(mapped) - math.prod(plan["shape"])  # behind NumPy's header
        pixels = np.frombuffer(mapped, np.uint8, offset=offset).reshape(plan["shape"])
        notes = [*notes, f"pixels are kept in {place} and read from there"]
    broken = [(ids[row], reason) for row, reason in left_out.items()]
    return torch.from_numpy(pixels[: len(kept)]), Originals(parts, kept, plan["scale"]), broken, notes


def _planned(parts: list[Block], ids: Sequence[str], image_size: int | None, at_most: int | None) -> dict:
    """Read all headers, and return a dictionary that JSON can hold.

    shape: of the array, with a row for each image that has a header; reasons: [(row, why it cannot be read)]; notes;
    small: whether an image is; scale: of images of more than eight bits.
    """
    found = _in_parallel(_headers, parts, [()] * len(parts), "reading headers", processes=len(ids) > MANY)
    headers = [header for header in found if not isinstance(header, str)]
    table, levels = np.array([header[:-1] for header in headers], np.int64), [header[-1] for header in headers]
    reasons = _some_left([(row, header) for row, header in enumerate(found) if isinstance(header, str)], ids)
    shape, notes = decode.layout(table, image_size, at_most)
    small = bool(table[:, :2].prod(1).mean() <= SMALL_PIXELS)
    scale, more = decode.scale([found for found in levels if found])
    return {"shape": [len(table), *shape], "reasons": reasons, "notes": notes + more, "small": small, "scale": scale}


def _built(place: Path, parts: list[Block], ids: Sequence[str], plan: dict) -> dict:
    """Decode into a file in `place`, unless another process just has; return the plan, which is written last."""
    with _alone(place):
        if before := _read(place, plan["fingerprint"]):
            return before
        for name in ("plan.json", "pixels.npy"):  # of other sources, or of a build that was killed
            (place / name).unlink(missing_ok=True)
        files.drop_torn(place)
        pixels = decode.allocate(plan["shape"], place / "pixels.npy")
        plan = _decoded(parts, ids, plan, pixels)
        pixels.flush()
        files.write_json(place / "plan.json", plan)
        return plan


def _decoded(parts: list[Block], ids: Sequence[str], plan: dict, pixels: np.ndarray) -> dict:
    """Decode all blocks into `pixels`, move the readable rows to the front, and return the finished plan.

    An array is filled by threads (by one, if the images are small), a mapped file by processes. Measured on two cores,
    a PNG of 32 x 32 takes 100 us in one thread, 135 in two, 59 in two processes (Python's lock is held most of the
    time); a JPEG of 500 x 375 shrunk to 224 takes 2.3 ms, 1.2 and 1.5.
    """
    readable, file = np.ones(len(ids), bool), getattr(pixels, "filename", None)
    readable[[row for row, _ in plan["reasons"]]] = False
    places = np.where(readable, readable.cumsum() - 1, -1)
    split = np.split(places, np.cumsum([part.number for part in parts])[:-1])
    arguments = [(rows, file or pixels, plan["scale"]) for rows in split]
    found = _in_parallel(_pixels, parts, arguments, "decoding", bool(file), 1 if plan["small"] and not file else None)
    reasons = _some_left(sorted([*plan["reasons"], *((row, why) for row, why in enumerate(found) if why)]), ids)
    if len(reasons) > len(plan["reasons"]):  # moved in place: a copy might not fit into memory
        kept, step = np.delete(places, [row for row, _ in reasons]), max(1, (1 << 26) // pixels[0].nbytes)
        for start in range(0, len(kept), step):
            part = kept[start : start + step]
            pixels[start : start + len(part)] = pixels[part]
    blank = decode.blank(pixels[: len(ids) - len(reasons)]).sum()
    notes = [*plan["notes"], f"{blank:,} blank images, each of one colour"] if blank else plan["notes"]
    return plan | {"reasons": reasons, "notes": notes}


def _in_parallel(
    task: Callable, parts: list[Block], arguments: list[tuple], title: str, processes: bool, jobs: int | None = None
) -> list:
    """Return what `task` makes of each image, given the `read` of a block and its `arguments`.

    There are as many `jobs` as torch has threads unless said. A progress bar shows if it takes long. Raises InputError
    if a process has died.
    """
    import torch
    from joblib import Parallel, delayed

    jobs = min(jobs or torch.get_num_threads(), max(1, len(parts)))
    processes, found = processes and jobs > 1, []
    options = {"backend": "loky", "idle_worker_timeout": 10} if processes else {"backend": "threading"}
    run = Parallel(jobs, return_as="generator", max_nbytes=None, **options)
    task = functools.partial(_quietly, task) if processes else task  # filters of warnings are not a thread's
    with tqdm(total=sum(part.number for part in parts), desc=title, unit=" images", delay=3, leave=False) as bar:
        try:
            for results in run(delayed(task)(part.read, *more) for part, more in zip(parts, arguments, strict=True)):
                bar.update(len(results))
                found += results
        except BrokenExecutor as error:
            why = str(error).partition("\n")[0][:200]
            raise InputError(f"a process that decodes images has died: {why}; run again") from None
    return found


def _quietly(task: Callable, *arguments: object) -> list:
    with decode.quiet():
        return task(*arguments)


def _headers(read: Callable) -> list[tuple | str]:
    return [decode.header(image) for image in read()]


def _pixels(read: Callable, places: np.ndarray, into: np.ndarray | Path, scale: decode.Scale | None) -> list[str]:
    """Decode the images of a block whose place is not negative; return why each failed, "" if it did not."""
    pixels = np.lib.format.open_memmap(into, "r+") if isinstance(into, Path) else into
    put = functools.partial(decode.put, scale=scale)
    return [put(image, pixels[i]) if i >= 0 else "" for image, i in zip(read(), places, strict=True)]


def _some_left(reasons: list[tuple[int, str]], ids: Sequence[str]) -> list[tuple[int, str]]:
    if len(reasons) == len(ids):
        row, reason = reasons[0]
        raise InputError(f"none of the {len(ids)} images can be read, the first: '{ids[row]}' ({reason})")
    return reasons


def _fingerprint(paths: Iterable[str | Path], *choices: object) -> str:
    """Return what changes when a source does: hex SHA-256 of the names, sizes and times of `paths` and of `choices`."""
    digest = hashlib.sha256(json.dumps([VERSION, *choices]).encode())
    for path in paths:
        with suppress(OSError):  # it has vanished since it was listed, and will be listed as unreadable
            status = os.stat(path)
            digest.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"))
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


def _read(place: Path, fingerprint: str) -> dict:
    """Return the plan of a finished build in `place`; nothing if there is none, or one of other sources."""
    with suppress(OSError, ValueError):
        plan = json.loads((place / "plan.json").read_bytes())
        return plan if plan.get("fingerprint") == fingerprint else {}
    return {}
