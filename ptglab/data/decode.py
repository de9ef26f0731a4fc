"""Decode an image with Pillow, upright and as uint8; a damaged one gives the reason in one line."""

import ctypes
import io
import logging
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ptglab import files
from ptglab.errors import InputError
from ptglab.text import printable

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used: a process that decodes does without its half a gigabyte

SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm",
            ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".ico", ".tga", ".pcx", ".sgi",
            ".qoi", ".psd"}  # fmt: skip
# What a file of such a name may really hold. Not all that Pillow opens: it starts Ghostscript for some, and guesses.
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI", "PSD",
           "PCX", "SGI", "TGA"]  # fmt: skip
MAX_PIXELS = 100_000_000  # of one image; a larger one is listed as unreadable
MAX_BYTES = 4 * MAX_PIXELS  # of one image file
MAX_SIDE = 65_535  # to resize a longer side, Pillow's filter would take gigabytes
LARGE_PIXELS = 30_000_000  # threads decode larger images one at a time: there may be more threads than gigabytes
IN_MEMORY = 2 << 30  # bytes of an array above which `allocate` maps a temporary file
MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_large = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs to stderr what it also raises


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Pillow and libtiff say of damage that they read over, in this process and its threads."""
    with suppress(OSError, AttributeError):  # where libtiff is not linked dynamically; it has no other switch
        pillow = ctypes.CDLL(Image.core.__file__)
        pillow.TIFFSetErrorHandler(None)
        pillow.TIFFSetWarningHandler(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layout(found: np.ndarray, image_size: int | None, at_most: int | None) -> tuple[tuple[int, int, int], list[str]]:
    """Return the one (channels, height, width) for images of headers `found`, int [N, 4], and notes on what changes.

    A row is width, height, whether it is grey, whether it has an alpha channel. Images of one size keep it; mixed ones
    become a square of the median side, 32 to 224; those larger than `at_most` a square of that side; all of them one of
    `image_size`, if given. All grey stays one channel.
    """
    sizes, grey, alpha, notes = found[:, :2], found[:, 2].sum(), found[:, 3].sum(), []
    different = len(np.unique(sizes, axis=0))
    width, height = map(int, sizes[0])
    if image_size:
        width = height = image_size
    elif different > 1 or max(width, height) > (at_most or np.inf):
        side = int(np.clip(np.median(sizes), 32, 224)) if different > 1 else max(width, height)
        side = min(side, at_most or side)
        what = f"{different} sizes, all" if different > 1 else f"{width} x {height} pixels,"
        notes.append(f"images of {what} resized to {side} x {side}")
        width = height = side
    channels = 1 if grey == len(found) else 3
    notes += [f"{grey:,} grey images converted to colour"] if channels == 3 and grey else []
    notes += [f"{alpha:,} images with an alpha channel, which was dropped"] if alpha else []
    return (channels, height, width), notes


def header(file) -> tuple[int, int, bool, bool] | str:
    """Return (width, height, is it grey, has it an alpha channel) of a path or open file, or why it is unreadable."""
    try:
        length = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.path.getsize(file)
        if length > MAX_BYTES:
            return f"{length:,} bytes are more than {MAX_BYTES:,}"
        with _open(file) as image:
            _check_size(image)
            alpha = "A" in image.getbands() or "transparency" in image.info
            grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
            return (*(image.size[::-1] if _lies(image) else image.size), grey, alpha)
    except Image.UnidentifiedImageError:
        return "not an image" if length else "not an image: it is empty"
    except Exception as error:  # a decoder may raise anything on a damaged file
        return _reason(error)


def put(file, into: np.ndarray) -> str:
    """Decode a path or an open file into uint8 [C, H, W]; return why it cannot be decoded, or nothing.

    Of an animation it is the first frame, of deep grey the upper eight bits.
    """
    try:
        with _open(file) as image, _large if math.prod(image.size) > LARGE_PIXELS else nullcontext():
            image = _upright(image).convert("L" if len(into) == 1 else "RGB")
            if image.size != into.shape[:0:-1]:
                image = image.resize(into.shape[:0:-1], Image.Resampling.BICUBIC)
            into[:] = np.asarray(image).reshape(*into.shape[1:], len(into)).transpose(2, 0, 1)
    except Exception as error:  # a decoder may raise anything on a damaged file
        return f"cannot be decoded: {_reason(error)}"
    return ""


def upright(file, about: int | None = None) -> Image.Image:
    """Return the image in `file` (a path or an open file) of its own size, upright, eight bits a channel.

    With `about` a JPEG is decoded at the fraction of its size that is nearest above that many pixels a side, which is
    many times faster. Raises whatever Pillow does on a damaged file.
    """
    with _open(file) as image:
        return _upright(image, about)


def _open(file) -> Image.Image:
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _upright(image: Image.Image, about: int | None = None) -> Image.Image:
    _lies(image)  # reads the camera's note; one that stands behind the pixels is not followed, as `header` cannot
    if about:
        image.draft(None, (about, about))
    image.load()
    _check_size(image)  # again: an icon may hold an image of another size than it says
    with suppress(Exception):  # a damaged note is no reason to miss the image
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    image.info.pop("transparency", None)  # dropped in any case; Pillow warns of some
    return image.copy()


def _lies(image: Image.Image) -> bool:
    """Return whether the camera's note says that width and height change places; Pillow turns TIFF by itself."""
    with suppress(Exception):
        # Not the method of PNG images, which would decode all pixels to look for a note behind them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8) and image.format != "TIFF"
    return False


def _check_size(image: Image.Image) -> None:
    if math.prod(image.size) > MAX_PIXELS or max(image.size) > MAX_SIDE:
        limit = f"there may be {MAX_PIXELS:,}, and {MAX_SIDE:,} a side"
        raise ValueError(f"{image.width} x {image.height} pixels are too many: {limit}")


def _eight_bits(deep: np.ndarray) -> np.ndarray:
    """Return uint8 of 16-bit numbers, or of fractions from 0 to 1 or 0 to 255."""
    if np.issubdtype(deep.dtype, np.integer):
        return (deep >> 8).clip(0, 255).astype(np.uint8)
    scale = 255 if deep.max(where=np.isfinite(deep), initial=0) <= 1 else 1
    return np.nan_to_num(deep * np.float32(scale)).clip(0, 255).round().astype(np.uint8)


def _reason(error: Exception) -> str:
    """Return in one short line what `error` says, without the path of the file."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return printable(text[:200]) or type(error).__name__


def allocate(shape: tuple[int, ...], path: Path | None = None) -> np.ndarray:
    """Return an uninitialised uint8 array [N, ...] in memory, or mapped to the .npy file `path`.

    Without a `path`, it is mapped past IN_MEMORY bytes, or half the free memory, to a temporary file that goes with it.
    Raises InputError, with the mend, if it does not fit.
    """
    size, mend = math.prod(shape), "PTGLAB_CACHE" if path else "TMPDIR"
    if not path and size <= min(IN_MEMORY, free_memory() / 2):
        return np.empty(shape, np.uint8)
    with nullcontext() if path else tempfile.NamedTemporaryFile() as temporary:  # the mapping outlives it
        path = path or Path(temporary.name)
        array = np.lib.format.open_memmap(path, "w+", np.uint8, tuple(shape))
        try:
            with open(path, "r+b") as file:
                files.allocate(file, path.stat().st_size)
        except OSError:
            path.unlink()
            free = shutil.disk_usage(path.parent).free / 1e9
            raise InputError(f"{shape[0]:,} images of {size / 1e9:.1f} GB do not fit into {path.parent}, where "
                             f"{free:.1f} GB are free: give a smaller image_size, or set {mend} to a folder with more "
                             "room") from None  # fmt: skip
        return array


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
