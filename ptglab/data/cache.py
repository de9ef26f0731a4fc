"""The cache of pixels: a set too large to decode at each start is decoded once, by processes side by side, into a file.

The file is mapped, so that only what is looked at is in memory. It lies in a folder of its own below PTGLAB_CACHE, by
default `ptglab` in XDG_CACHE_HOME or ~/.cache, and may be deleted at any time. Blocks of images are marked as they are
done: a build that was killed goes on. Where the sources have changed, by name, size or time, it is built anew.
"""

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ptglab.data import decode
from ptglab import files
from ptglab.errors import InputError
from ptglab.data.sources import KINDS, Files, Shards

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used, see `decode`

LARGE = 1 << 30  # bytes of pixels, or of parquet files, above which a set is cached; decoding so many takes a minute
CHUNK = 1 << 26  # bytes of pixels that a process holds
FEWEST = 100  # images that are worth it
VERSION = 1  # of the layout of the folder, and of how images are decoded
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


def is_large(sources: Files | Shards, image_size: int | None, at_most: int | None) -> bool:
    """Whether a set is cached: by the headers of a few images and how many there are."""
    if len(sources) < FEWEST:
        return False
    with decode.quiet():
        headers = [header for header in map(decode.header, sources.sample()) if not isinstance(header, str)]
    if not headers:
        return sources.bytes() > LARGE
    shape, _ = decode.layout(np.stack(headers), image_size, at_most)
    return max(len(sources) * math.prod(shape), sources.bytes()) > LARGE


def images(
    sources: Files | Shards, ids: Sequence[str], place: Path, image_size: int | None, at_most: int | None
) -> "tuple[Tensor, list[int], list[tuple[str, str]], list[str]]":
    """Return what `decode.decode` does, from the cache `place`, which is built first if it has to be.

    The tensor is mapped to a file; what is written to it stays in this process. Raises InputError if no image is
    readable, if the disk is too small, and if a process that decodes has failed.
    """
    import torch

    digest = hashlib.sha256(json.dumps([VERSION, len(sources), image_size, at_most]).encode())
    for line in sources.state():
        digest.update(os.fsencode(line) + b"\n")
    fingerprint = digest.hexdigest()
    if _read(place / "done.json").get("fingerprint") != fingerprint:
        try:
            with files.writing(place):
                place.mkdir(parents=True, exist_ok=True)
            with _alone(place):
                if _read(place / "done.json").get("fingerprint") != fingerprint:
                    _build(place, sources, ids, fingerprint, image_size, at_most)
        except InputError as error:
            raise InputError(f"{error} (the cache of pixels: PTGLAB_CACHE names another folder for it)") from None
    done = _read(place / "done.json")
    with open(place / "pixels", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, **PRIVATE)
    pixels = torch.from_numpy(np.frombuffer(mapped, np.uint8, math.prod(done["shape"])).reshape(done["shape"]))
    kept = np.load(place / "kept.npy").tolist()
    broken = [(ids[row], reason) for row, reason in done["reasons"]]
    return pixels, kept, broken, [*done["notes"], f"pixels are kept in {place} and read from there"]


def _alone(place: Path):
    """Return the lock of `place`; wait, and say so, while another process builds it."""
    try:
        return files.lock(place, "process")
    except InputError as error:
        print(f"{error}; waiting for its cache of pixels", file=sys.stderr)
        return files.lock(place, "process", math.inf)


def _build(place: Path, sources, ids, fingerprint: str, image_size: int | None, at_most: int | None) -> None:
    """Fill in `place`: headers, which say the one size; pixels; then without those that cannot be decoded."""
    plan = {"fingerprint": fingerprint, "kind": next(name for name, kind in KINDS.items() if isinstance(sources, kind))}
    before = _read(place / "plan.json")
    if before.get("fingerprint") != fingerprint or (place / "packing").exists():
        (place / "done.json").unlink(missing_ok=True)  # before its pixels
        for path in place.iterdir():  # of other sources, or pixels that were being moved when it was killed
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("headers", "pixels_done"):
            (place / name).mkdir()
        plan |= {"sources": vars(sources), "blocks": sources.blocks()}
        _write(place / "plan.json", plan)
    files.drop_torn(place)
    blocks = _read(place / "plan.json")["blocks"]
    if not (place / "layout.json").exists():
        _work(place, "headers", blocks, "reading headers")
        headers, reasons = np.zeros((len(sources), 4), np.int32), []
        for first, _, _ in blocks:
            found = _read(place / "headers" / f"{first}.json")
            headers[first : first + len(found["rows"])] = found["rows"]
            reasons += found["reasons"]
        readable = headers[:, 0] > 0
        if not readable.any():
            raise InputError(f"none of the {len(ids)} images can be read, the first: {ids[0]!r} ({reasons[0][1]})")
        shape, notes = decode.layout(headers[readable], image_size, at_most)
        at = np.where(readable, readable.cumsum() - 1, -1)
        files.write(place / "at.npy", lambda path: _save(path, at))
        shape = [int(readable.sum()), *shape]
        _allocate(place / "pixels", math.prod(shape))
        _write(place / "layout.json", {"shape": shape, "notes": notes, "reasons": reasons})
    _work(place, "pixels", blocks, "decoding")
    layout, at = _read(place / "layout.json"), np.load(place / "at.npy")
    failed = [pair for first, _, _ in blocks for pair in _read(place / "pixels_done" / f"{first}.json")["reasons"]]
    kept = np.setdiff1d(np.flatnonzero(at >= 0), [row for row, _ in failed])
    if not len(kept):
        raise InputError(
            f"none of the {len(ids)} images can be read, the first: {ids[failed[0][0]]!r} ({failed[0][1]})"
        )
    if failed:
        _pack(place, layout["shape"], at[kept])
    reasons = sorted(layout["reasons"] + failed)
    files.write(place / "kept.npy", lambda path: _save(path, kept))
    done = {"fingerprint": fingerprint, "shape": [len(kept), *layout["shape"][1:]], "notes": layout["notes"]}
    _write(place / "done.json", done | {"reasons": reasons})
    for name in ("plan.json", "layout.json", "at.npy", "packing"):
        (place / name).unlink(missing_ok=True)
    for name in ("headers", "pixels_done"):
        shutil.rmtree(place / name)


def _allocate(path: Path, size: int) -> None:
    try:
        with open(path, "wb") as file:
            files.allocate(file, size)
            file.truncate(size)
    except OSError:
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e9
        raise InputError(f"pixels of {size / 1e9:.1f} GB do not fit into {path.parent}, where {free:.1f} GB are free: "
                         "give a smaller image_size, or make room") from None  # fmt: skip


def _pack(place: Path, shape: list[int], rows: np.ndarray) -> None:
    """Move `rows`, int64 [M] ascending, of the pixels to the front."""
    (place / "packing").touch()
    size = math.prod(shape[1:])
    with open(place / "pixels", "r+b") as file:
        step = max(1, CHUNK // size)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            file.seek(int(part[0]) * size)
            block = np.frombuffer(file.read(int(part[-1] - part[0] + 1) * size), np.uint8).reshape(-1, size)
            file.seek(start * size)
            file.write(block[part - part[0]].tobytes())
        file.truncate(len(rows) * size)


def _work(place: Path, stage: str, blocks: list, title: str) -> None:
    """Have processes, as many as torch has threads, do a stage of all blocks that are not marked as done.

    They are started by name, not forked: threads of torch or a GPU are no concern of theirs, nor is this program's
    `__main__`. Each ends with this process.
    """
    import torch

    marks = place / ("headers" if stage == "headers" else "pixels_done")
    workers = min(len(blocks), torch.get_num_threads())
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ptglab.data.cache", str(place), stage, str(workers)]
    sizes = {f"{first}.json": rows for first, rows, _ in blocks}
    if workers == 1:  # a process of its own would gain nothing
        with tqdm(total=sum(sizes.values()), desc=title, unit=" images", delay=3, leave=False) as bar, decode.quiet():
            for rows in worker(place, stage, 1, 0):
                bar.update(rows)
        return
    running = []
    try:
        for i in range(workers):
            running.append(
                subprocess.Popen([*command, str(i)], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        with tqdm(total=sum(sizes.values()), desc=title, unit=" images", delay=3, leave=False) as bar:
            while any(process.poll() is None for process in running):
                bar.update(sum(sizes.get(name, 0) for name in os.listdir(marks)) - bar.n)
                time.sleep(0.1)
                if any(process.poll() for process in running):
                    break
        for process in running:
            if process.poll():
                said = process.stderr.read().decode(errors="replace").strip().splitlines()
                why = (
                    said[-1].removeprefix("ptglab.errors.InputError: ")
                    if said
                    else f"it ended with {process.returncode}"
                )
                raise InputError(f"a process that decodes images has failed: {why}; {files.GO_ON}")
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
            process.stderr.close()


def worker(place: Path, stage: str, workers: int, number: int) -> Iterator[int]:
    """Do every `workers`-th block from `number` on, while the process that asked for it runs; yield their rows."""
    plan, parent = _read(place / "plan.json"), os.getppid()
    sources = KINDS[plan["kind"]](**plan["sources"])
    skipped = set(plan["sources"].get("skipped", ()))
    layout, at = _read(place / "layout.json"), np.load(place / "at.npy") if stage == "pixels" else None
    for first, rows, part in plan["blocks"][number::workers]:
        mark = place / ("headers" if stage == "headers" else "pixels_done") / f"{first}.json"
        if mark.exists():
            yield rows
            continue
        if os.getppid() != parent:
            return
        found = sources.read(part)
        if stage == "headers":
            done = _headers(found, first, skipped)
        else:
            done = _pixels(place, found, at[first : first + rows], first, layout["shape"][1:])
        _write(mark, done)
        yield rows


def _headers(found: Iterator, first: int, skipped: set[int]) -> dict:
    rows, reasons = [], []
    for row, image in enumerate(found, first):
        header = "" if row in skipped else decode.header(image)
        rows.append([0] * 4 if isinstance(header, str) else header.tolist())
        if isinstance(header, str) and header:
            reasons.append([row, header])
    return {"rows": rows, "reasons": reasons}


def _pixels(place: Path, found: Iterator, at: np.ndarray, first: int, shape: list[int]) -> dict:
    """Decode the readable ones of a block, which lie one behind the other in the file, and flush them to the disk."""
    reasons, size = [], math.prod(shape)
    held = np.empty((max(1, min(len(at), CHUNK // size)), *shape), np.uint8)
    with open(place / "pixels", "r+b") as file:
        filled, start = 0, int(next(iter(at[at >= 0]), 0))
        for row, (image, position) in enumerate(zip(found, at, strict=True), first):
            if position < 0:
                continue
            if reason := decode.put(image, held[filled]):
                held[filled] = 0
                reasons.append([row, reason])
            filled += 1
            if filled == len(held):
                start = _flush(file, held, start, size)
                filled = 0
        _flush(file, held[:filled], start, size)
        file.flush()
        os.fsync(file.fileno())
    return {"reasons": reasons}


def _flush(file, held: np.ndarray, start: int, size: int) -> int:
    """Write images at row `start` of the file; return the row after them."""
    file.seek(start * size)
    file.write(held.data)
    return start + len(held)


def _read(path: Path) -> dict:
    """Return what is in a JSON file; nothing if it is not there."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}


def _write(path: Path, content: dict) -> None:
    files.write(path, lambda temporary: temporary.write_bytes(json.dumps(content).encode()))


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


if __name__ == "__main__":
    with decode.quiet():
        for _ in worker(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])):
            pass
