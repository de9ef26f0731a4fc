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
INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "lanczos"]
# A JPEG is decoded at the smallest scale that leaves so many times the pixels wanted, as by Pillow's `thumbnail`.
GAP = 2
SCANNED = 15 * MAX_PIXELS  # pixels times scans of a progressive JPEG, which take a second per hundred million
FRAMES = 32  # of an animation or file of pages that are looked at for one that is not blank
WHITE = 230  # from which on a pixel is nearly white
BLANK = 2  # levels of 255 between which a blank image lies
QUANTILES = (np.arange(32) + 0.5) / 32  # of the numbers in an image of more than eight bits
Scale = dict[str, tuple[float, float]]  # by kind of numbers, "I" or "F": which is black, and how many make 256 levels
NOMINAL = {"I": (0, 1 << 16), "F": (0, 1)}
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
        warnings.filterwarnings("ignore", module=r"PIL|numpy|ptglab\.data")  # not those of who reads a stream
        yield


def layout(found: np.ndarray, image_size: int | None, at_most: int | None) -> tuple[tuple[int, int, int], list[str]]:
    """Return the one (channels, height, width) for images of headers `found`, int [N, 5], and notes on what changes.

    A row is width, height, whether it is grey, has an alpha channel, has several frames.
    Images of one size keep it; mixed ones become a square of the median side, 32 to 224; those larger than `at_most` a
    square of that side; all of them one of `image_size`, if given. All grey stays one channel.
    """
    sizes, (grey, alpha, several), notes = found[:, :2], found[:, 2:].sum(0), []
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
    notes += [f"{alpha:,} images with an alpha channel, put on white, or on grey what is white itself"] if alpha else []
    pages = "animations or files of several pages, of which the first that is not blank was used"
    notes += [f"{several:,} {pages}"] if several else []
    return (channels, height, width), notes


def header(file) -> tuple[int, int, bool, bool, bool, tuple[str, np.ndarray] | None] | str:
    """Return the row for `layout` of a path or open file, or why it is unreadable.

    An image of more than eight bits is decoded for the last value, which is for `scale`: the kind of its numbers, and
    their minimum, QUANTILES and maximum.
    """
    try:
        length = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.path.getsize(file)
        if length > MAX_BYTES:
            return f"{length:,} bytes are more than {MAX_BYTES:,}"
        with _open(file) as image:
            _check_size(image)
            if image.info.get("progressive"):
                content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
                if (scans := content.count(b"\xff\xda")) * math.prod(image.size) > SCANNED:
                    return f"a progressive JPEG of {scans:,} scans, which takes too long"
            width, height = image.size[::-1] if _lies(image) else image.size
            return width, height, *_kind(image), _levels(image)
    except Image.UnidentifiedImageError:
        return "not an image" if length else "not an image: it is empty"
    except Exception as error:  # a decoder may raise anything on a damaged file
        return _reason(error)


def scale(found: list[tuple[str, np.ndarray]]) -> tuple[Scale, list[str]]:
    """Return one scale for all images of more than eight bits, of which `header` found this, and notes on it.

    It reaches from the least to the greatest number. If these are eight times as far apart as the .1 and 99.9
    percentiles are, it reaches from one to the other: a few hot pixels shall not make everything black. Numbers from 0
    that fill more than half of 8, 10, 12, 14 or 16 bits, or of 0 to 1, are taken to be meant so.
    """
    scales, notes = {}, []
    for kind in sorted({kind for kind, _ in found}):
        table = np.stack([values for own, values in found if own == kind])
        low, high = float(table[:, 0].min()), float(table[:, -1].max())
        inner = np.percentile(table[:, 1:-1], [0.1, 99.9]).tolist()
        if 0 < 8 * (inner[1] - inner[0]) < high - low:
            low, high = inner
        for most in [1] * (kind == "F") + [255, 1023, 4095, 16383, 65535]:
            if 0 <= low <= high <= most and (high - low > most / 2 or high == low):
                low, high = 0, most
                break
        scales[kind] = low, high - low + (kind == "I") or 1
        notes.append(f"{len(table):,} images of more than eight bits, in which {low:g} is black and {high:g} white")
    return scales, notes


def blank(images: np.ndarray) -> np.ndarray:
    """Return which of the uint8 images [N, C, H, W] are all of one colour, give or take BLANK levels; bool [N]."""
    step = max(1, (1 << 26) // math.prod(images.shape[1:]))
    parts = (images[start : start + step] for start in range(0, len(images), step))
    return np.concatenate([np.ptp(part.reshape(*part.shape[:2], -1), 2).max(1) <= BLANK for part in parts])


def put(file, into: np.ndarray, crop: float = 0, interpolation: str = "bicubic", scale: Scale | None = None) -> str:
    """Decode a path, an open file or an array into uint8 [C, H, W]; return why it cannot be decoded, or nothing.

    Without `crop` the image is resized to H x W whatever its aspect. With it, as timm evaluates a network: the shorter
    side becomes floor(H / crop), and the square of H in the middle is cut out. See `upright`.
    """
    try:
        with _open(file) as image, _large if math.prod(image.size) > LARGE_PIXELS else nullcontext():
            shorter = math.floor(max(into.shape[1:]) / (crop or 1))
            size = image.size[::-1] if _lies(image) else image.size
            image = _upright(image, GAP * shorter, scale).convert("L" if len(into) == 1 else "RGB")
            box = _middle(size, image.size, shorter, into.shape[1]) if crop else None
            image = image.resize(into.shape[:0:-1], Image.Resampling[interpolation.upper()], box)
            into[:] = np.asarray(image).reshape(*into.shape[1:], len(into)).transpose(2, 0, 1)
    except Exception as error:  # a decoder may raise anything on a damaged file
        return f"cannot be decoded: {_reason(error)}"
    return ""


def upright(file, about: int | None = None, scale: Scale | None = None) -> Image.Image:
    """Return the image in `file` (a path or an open file) of its own size, upright, opaque, eight bits a channel.

    What is transparent becomes white, or grey if what is to be seen is white itself. Of frames or pages it is the first
    that is not blank. Numbers of more than eight bits are shown by `scale`.
    With `about` a JPEG is decoded at the fraction of its size that is nearest above that many pixels a side, which is
    many times faster. Raises whatever Pillow does on a damaged file.
    """
    with _open(file) as image:
        return _upright(image, about, scale)


def _open(file) -> Image.Image:
    if isinstance(file, np.ndarray):
        return Image.fromarray(file)
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _middle(size: tuple[int, int], decoded: tuple[int, int], shorter: int, side: int) -> list[float]:
    """Return the box of the `decoded` pixels that becomes the `side` pixels in the middle, once `size` is resized."""
    resized = [shorter * length // min(size) for length in size]
    first = [round((length - side) / 2) for length in resized]
    ends = first + [start + side for start in first]
    return [end / all * pixels for end, all, pixels in zip(ends, resized * 2, decoded * 2, strict=True)]


def _upright(image: Image.Image, about: int | None = None, scale: Scale | None = None) -> Image.Image:
    _lies(image)  # reads the camera's note; one that stands behind the pixels is not followed, as `header` cannot
    if about:
        image.draft(None, (about, about))
    *_, several = _kind(image)
    first = _opaque(image, scale)
    if several and first.convert("RGB").getcolors(1):
        with suppress(Exception):  # there are no more frames, or damaged ones
            later = (_opaque(image, scale, frame) for frame in range(1, FRAMES))
            return next(picture for picture in later if not picture.convert("RGB").getcolors(1))
    return first


def _opaque(image: Image.Image, scale: Scale | None, frame: int = 0) -> Image.Image:
    image.seek(frame)
    image.load()
    _check_size(image)  # again: an icon may hold an image of another size than it says
    picture = image.copy()
    with suppress(Exception):  # a damaged note is no reason to miss the image
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode[0] in NOMINAL:
        low, width = (NOMINAL | (scale or {}))[picture.mode[0]]
        deep = np.nan_to_num(np.asarray(picture), nan=low, posinf=low + width, neginf=low)
        shown = (deep - np.float32(low)) * np.float32(256 / width)
        return Image.fromarray(shown.clip(0, 255).astype(np.uint8))
    grey, alpha, _ = _kind(picture)
    if alpha:
        picture = picture.convert("RGBA")
        seen = picture.convert("L").histogram(picture.getchannel("A"))
        ground = 128 if sum(seen[WHITE:]) > 0.9 * sum(seen) else 255
        whole = Image.new("RGBA", picture.size, (ground, ground, ground, 255))
        whole.alpha_composite(picture)
        picture = whole.convert("L" if grey else "RGB")
    return picture


def _kind(image: Image.Image) -> tuple[bool, bool, bool]:
    """Return whether an image is grey, has an alpha channel, and is an animation or one of several pages."""
    deep, several = image.mode[0] in NOMINAL, False
    with suppress(Exception):
        several = image.format != "MPO" and getattr(image, "is_animated", False)  # not what a camera adds to a JPEG
    return image.mode in ("1", "L", "LA") or deep, "A" in image.getbands() or "transparency" in image.info, several


def _levels(image: Image.Image) -> tuple[str, np.ndarray] | None:
    if image.mode[0] in NOMINAL:
        with suppress(Exception), _large if math.prod(image.size) > LARGE_PIXELS else nullcontext():
            deep = np.asarray(image)
            finite = deep[np.isfinite(deep)]
            inner = np.quantile(finite[:: 1 + finite.size // 65536], QUANTILES)
            return image.mode[0], np.array([finite.min(), *inner, finite.max()], np.float32)
    return None  # or it cannot be decoded, which `put` says, or holds no number


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
