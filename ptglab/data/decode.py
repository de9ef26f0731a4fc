"""Decoding: many image files, or their bytes, into one uint8 tensor, in parallel; what cannot be read is listed."""

import ctypes
import functools
import io
import logging
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from ptglab import files
from ptglab.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used: a process that decodes does without its half a gigabyte

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# What a file of such a name may really hold. Not all that Pillow opens: it starts Ghostscript for some, and guesses.
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO"]
MAX_PIXELS = 100_000_000  # of one image; a larger one is listed as unreadable
MAX_BYTES = 4 * MAX_PIXELS  # of one image file, which is seldom more than its pixels
MAX_SIDE = 65_535  # to resize a longer side, Pillow's filter would take gigabytes
LARGE_PIXELS = 30_000_000  # images of more are decoded one at a time: a machine may have more threads than gigabytes
IN_MEMORY = 2 << 30  # bytes of pixels above which they lie in a memory-mapped temporary file
BLOCK = 64  # images a task
SMALL_PIXELS = 96 * 96
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}  # fmt: skip
_large = threading.Lock()

# Pillow logs to stderr, where nobody listens, what it also raises.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode(
    sources: list, ids: list[str], opened: Callable, image_size: int | None, at_most: int | None = None
) -> "tuple[Tensor, list[int], list[tuple[str, str]], list[str]]":
    """Decode images in two passes: headers, then pixels straight into the one tensor.

    sources: what `opened` turns into something Pillow opens; ids: their names in messages. Images of one size keep it;
    mixed ones become a square of the median side, 32 to 224; those larger than `at_most` a square of that side; all of
    them one of `image_size`, if given. All grey stays one channel. A camera's note which side is up is followed.
    Returns (images uint8 [M, C, H, W], the M rows of `sources` that were readable, [(id, reason)] of the others, notes
    on what was changed). Raises InputError if none is readable.
    """
    import torch

    with quiet():
        pixels, *rest = _decode(sources, ids, opened, image_size, at_most)
    return torch.from_numpy(pixels), *rest


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Pillow and libtiff say of damage that they read over, in this process and its threads."""
    _silence_libtiff()
    with warnings.catch_warnings():  # around the threads, not in them: the filters belong to the whole process
        warnings.simplefilter("ignore")
        yield


def _decode(sources, ids, opened, image_size, at_most):
    headers = _in_parallel(lambda i: _header(opened(sources[i])), len(sources), "reading headers")
    reasons = {i: header for i, header in enumerate(headers) if isinstance(header, str)}
    rows = [i for i in range(len(sources)) if i not in reasons]
    pixels, notes = np.empty((0, 1, 1, 1), np.uint8), []
    if rows:
        found = np.array([(*size, grey, alpha) for size, grey, alpha in (headers[i] for i in rows)])
        (channels, *size), notes = layout(found, image_size, at_most)
        size, sizes = (size[1], size[0]), found[:, :2]
        pixels = allocate((len(rows), channels, size[1], size[0]))

        def fill(row: int) -> str:
            with _large if np.prod(sizes[row]) > LARGE_PIXELS else nullcontext():
                return put(opened(sources[rows[row]]), pixels[row])

        # A small image is mostly Python overhead, under one lock: threads would only get in each other's way.
        workers = None if np.prod(sizes, axis=1).mean() > SMALL_PIXELS else 1
        failed = _in_parallel(fill, len(rows), "decoding", workers)
        reasons |= {rows[row]: reason for row, reason in enumerate(failed) if reason}
    kept = [i for i in rows if i not in reasons]
    if not kept:
        raise InputError(f"none of the {len(sources)} images can be read, the first: '{ids[0]}' ({reasons[0]})")
    if len(kept) < len(rows):
        for new, row in enumerate(row for row, i in enumerate(rows) if i not in reasons):
            pixels[new] = pixels[row]  # in place: a copy of what is memory-mapped might not fit into memory
        pixels = pixels[: len(kept)]
    return pixels, kept, [(ids[i], reasons[i]) for i in sorted(reasons)], notes


def layout(headers: np.ndarray, image_size: int | None, at_most: int | None) -> tuple[tuple[int, int, int], list[str]]:
    """Return the one (channels, height, width) for images of `headers`, int [N, 4], and notes on what that changes.

    A row of headers is width, height, whether it is grey, whether it has an alpha channel.
    """
    grey, alpha = headers[:, 2].astype(bool), headers[:, 3].astype(bool)
    (width, height), notes = _common_size(headers[:, :2], image_size, at_most)
    channels = 1 if grey.all() else 3
    notes += [f"{grey.sum():,} grey images converted to colour"] if channels == 3 and grey.any() else []
    notes += [f"{alpha.sum():,} images with an alpha channel, which was dropped"] if alpha.any() else []
    return (channels, height, width), notes


def header(file) -> np.ndarray | str:
    """Return int64 [4], see `layout`, of an image (a path or an open file), or why it cannot be read."""
    found = _header(file)
    return found if isinstance(found, str) else np.array([*found[0], *found[1:]], np.int64)


def put(file, into: np.ndarray) -> str:
    """Decode an image (a path or an open file) into uint8 [C, H, W]; return why it cannot be decoded, or nothing."""
    try:
        into[:] = _pixels(file, len(into), (into.shape[2], into.shape[1]))
    except Exception as error:  # a decoder may raise anything on a damaged file
        return f"cannot be decoded: {_reason(error)}"
    return ""


def _in_parallel(task: Callable[[int], object], number: int, title: str, workers: int | None = None) -> list:
    """Return [task(0), ..., task(number - 1)], in `workers` threads, under a progress bar once it takes longer."""

    def block(start: int) -> list:
        return [task(i) for i in range(start, min(start + BLOCK, number))]

    results = []
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=number, desc=title, unit=" images", delay=3, leave=False) as bar,
    ):
        for part in pool.map(block, range(0, number, BLOCK)):
            results += part
            bar.update(len(part))
    return results


def _common_size(sizes: np.ndarray, image_size: int | None, at_most: int | None) -> tuple[tuple[int, int], list[str]]:
    """Return the one (width, height) for images of `sizes` [N, 2], and a note if that changes any unasked."""
    if image_size:
        return (image_size, image_size), []
    different = np.unique(sizes, axis=0)
    if len(different) == 1 and different.max() <= (at_most or np.inf):
        return (int(sizes[0][0]), int(sizes[0][1])), []
    side = int(np.clip(np.median(sizes), 32, 224) if len(different) > 1 else different.max())
    side = min(side, at_most or side)
    what = f"{len(different)} sizes, all" if len(different) > 1 else f"{sizes[0][0]} x {sizes[0][1]} pixels,"
    return (side, side), [f"images of {what} resized to {side} x {side}"]


def _header(file) -> tuple[tuple[int, int], bool, bool] | str:
    """Return ((width, height), is it grey, has it an alpha channel), or why it cannot be read."""
    try:
        length = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.path.getsize(file)
        if length > MAX_BYTES:
            return f"{length:,} bytes are more than {MAX_BYTES:,}"
        with Image.open(file, formats=_formats()) as image:
            if too_large := _too_large(image):
                return too_large
            alpha = "A" in image.getbands() or "transparency" in image.info
            return (
                image.size[::-1] if _orientation(image) >= 5 else image.size,
                image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"),
                alpha,
            )
    except Image.UnidentifiedImageError:
        return "not an image" if length else "not an image: it is empty"
    except Exception as error:  # a decoder may raise anything on a damaged file
        return _reason(error)


def _too_large(image: Image.Image) -> str:
    """Return why an image of that size is not read; empty if it is."""
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}"
    longest = max(image.size) > MAX_SIDE
    return f"{image.width} x {image.height} pixels: a side is longer than {MAX_SIDE:,}" if longest else ""


def _pixels(file, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Return uint8 [C, H, W]; of an animation the first frame, of deep grey the upper eight bits."""
    image = upright(file).convert("L" if channels == 1 else "RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def upright(file, about: int | None = None) -> Image.Image:
    """Return the image in `file` (a path or an open file) of its own size, upright, eight bits a channel.

    With `about` a JPEG is decoded at the fraction of its size that is nearest above that many pixels a side, which is
    many times faster. Raises whatever Pillow does on a damaged file.
    """
    with Image.open(file, formats=_formats()) as image:
        turn = TURNS.get(_orientation(image))
        if about:
            image.draft(None, (about, about))
        image.load()
        if too_large := _too_large(image):  # an icon may hold an image of another size than it says
            raise ValueError(too_large)
        if turn:
            image = image.transpose(Image.Transpose[turn])
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_eight_bits(np.asarray(image)))
        image.info.pop("transparency", None)  # dropped in any case; Pillow warns of some
        return image.copy()


def _eight_bits(deep: np.ndarray) -> np.ndarray:
    """Return uint8 of 16-bit numbers, or of fractions from 0 to 1 or 0 to 255."""
    if np.issubdtype(deep.dtype, np.integer):
        return (deep >> 8).clip(0, 255).astype(np.uint8)
    scale = 255 if deep.max(where=np.isfinite(deep), initial=0) <= 1 else 1
    return np.nan_to_num(deep * np.float32(scale)).clip(0, 255).round().astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """Return the camera's note which side is up, 1 to 8; 1 also for TIFF, which Pillow turns by itself."""
    orientation = 1
    with suppress(Exception):  # a damaged note is no reason to miss the image
        if image.format != "TIFF":
            # Not the method of PNG images, which would decode all pixels to look for a note behind them.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in TURNS else 1


@functools.cache
def _formats() -> list[str]:
    """Return those of FORMATS that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing to stderr what Pillow raises as well; it has no other switch."""
    with suppress(OSError, AttributeError):  # where it is not linked dynamically
        pillow = ctypes.CDLL(Image.core.__file__)
        pillow.TIFFSetErrorHandler(None)
        pillow.TIFFSetWarningHandler(None)


def _reason(error: Exception) -> str:
    """Return in one short line what `error` says, without the path of the file."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
    return text if text.isprintable() else ascii(text)[1:-1]


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array [N, ...]; past IN_MEMORY bytes, or half the free memory, in a temporary file.

    That goes with it. Raises InputError, with the mend, if it fits on neither.
    """
    size = math.prod(shape)
    if size <= min(IN_MEMORY, free_memory() / 2):
        return np.empty(shape, np.uint8)
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile() as file:  # the mapping outlives it
        try:
            files.allocate(file, size)
        except OSError:
            free = shutil.disk_usage(folder).free / 1e9
            raise InputError(
                f"{shape[0]:,} images of {size / 1e9:.1f} GB fit neither into memory nor into {folder}, where "
                f"{free:.1f} GB are free: give a smaller image_size, or set TMPDIR to a folder with more room"
            ) from None
        return np.memmap(file, np.uint8, "w+", shape=shape)


def resized(images: "Tensor", size: int) -> "Tensor":
    """Return uint8 images [N, C, H, W] as [N, C, size, size]."""
    import torch
    import torch.nn.functional as F

    square = torch.from_numpy(allocate((*images.shape[:2], size, size)))
    for block, into in zip(images.split(1024), square.split(1024), strict=True):
        smooth = F.interpolate(block.float(), (size, size), mode="bicubic", antialias=True)
        into.copy_(smooth.round().clamp(0, 255))
    return square


def free_memory() -> float:
    """Return how many bytes of memory this process can still take: the machine's, or its control group's."""
    free = math.inf
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # no group, or "max": no limit
        free = min(free, int((GROUP / "memory.max").read_text()) - int((GROUP / "memory.current").read_text()))
    return free


MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
