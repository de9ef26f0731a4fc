"""Image sets: one uint8 tensor of images, the labels in hand, and the true ones where they are known."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ptglab.data import cache, decode, folders, parquet, published
from ptglab.errors import InputError, one_of
from ptglab.text import printable

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used: processes that decode do without its half a gigabyte

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST", "svhn": "SVHN",
               "stl10": "STL10"}  # fmt: skip
NAMES = ("digits", *TORCHVISION)
MAX_SIDE = 4096  # that images can be resized to
MAX_LABELS = 1 << 24  # bytes of a file of human labels; the published ones have 2.5 million
# Label files of CIFAR-10N and CIFAR-100N (Wei et al. 2022, arXiv 2110.12088), found in the data root
CIFAR_N = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, row by row.

    images: uint8 [N, C, H, W]; labels_given: int64 [N], all that training and detection see; labels_true: int64 [N],
    or None where nobody knows; class_names: K texts; ids: N texts, unique. A text is one line that can be printed: what
    a name holds otherwise is escaped, as in `\\n` or `\\xff`. unreadable: (id, reason) of what is not among the N;
    notes: what was changed on the way in; files: the absolute paths of the N image files of a folder, none for other
    sources; originals: where `batches` finds the images of a folder or parquet file as they were.
    """

    images: "Tensor"
    labels_given: np.ndarray
    labels_true: np.ndarray | None
    class_names: list[str]
    ids: list[str]
    unreadable: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    files: Sequence[str | Path] = ()
    originals: cache.Originals | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Return a hex SHA-256 of ids, given labels, classes, shape, and a thousand rows of pixels or so."""
        digest = hashlib.sha256(json.dumps([self.ids, self.class_names, list(self.images.shape)]).encode())
        digest.update(self.labels_given.astype("<i8").tobytes())
        for image in self.images[:: max(1, len(self) // 1000)]:
            digest.update(image.numpy().tobytes())
        return digest.hexdigest()

    @property
    def blank(self) -> np.ndarray:
        """Return which images are all of one colour, bool [N]; nothing can be learned from them."""
        return decode.blank(self.images.numpy())

    def subset(self, number: int, seed: int) -> "ImageSet":
        """Return `number` rows drawn without replacement, in order; all of them for 0 or if there are no more."""
        if not 0 < number < len(self):
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:number])
        true = None if self.labels_true is None else self.labels_true[rows]
        files = [self.files[i] for i in rows] if self.files else ()
        originals = self.originals and self.originals._replace(rows=self.originals.rows[rows])
        return replace(self, images=self.images[rows], labels_given=self.labels_given[rows], labels_true=true,
                       ids=[self.ids[i] for i in rows], files=files, originals=originals)  # fmt: skip

    def batches(
        self, size: int, crop: float = 1.0, interpolation: str = "bicubic", batch_size: int = 64
    ) -> "Iterator[Tensor]":
        """Yield the images in order as uint8 [B, 3, size, size], from the original files where there are any.

        The shorter side becomes floor(size / crop), and the square in the middle is cut out, as timm's models are
        evaluated. A few batches are decoded ahead. Raises InputError that names a file that has changed.
        """
        import torch

        one_of("interpolation", interpolation, decode.INTERPOLATIONS)
        arrays = (image[: 1 if len(image) < 3 else 3].permute(1, 2, 0).squeeze(2).numpy() for image in self.images)
        pictures = self.originals.read() if self.originals else arrays
        scale = self.originals and self.originals.scale
        yield from map(torch.from_numpy, cache.stream(pictures, self.ids, size, batch_size, crop, interpolation, scale))

    def __str__(self) -> str:
        n, c, h, w = self.images.shape
        wrong = None if self.labels_true is None else (self.labels_true != self.labels_given).mean()
        truth = "unknown" if wrong is None else f"known ({wrong:.2%} of the given labels are wrong)"
        size = f"{h} x {w} pixels, {c} channel{'s' * (c > 1)}"
        lines = [f"{n:,} images of {size}; {self.num_classes} classes; truth {truth}", *self.notes]
        for id, reason in self.unreadable[:1]:
            lines.append(f"{len(self.unreadable):,} left out, the first: {id!r} ({reason})")
        return "\n".join(lines)


def load(
    source: str | Path, split: str = "train", labels: str | None = None,
    image_size: int | None = None, at_most: int | None = None,
) -> ImageSet:  # fmt: skip
    """Load the images and labels of `source`.

    source: a name of NAMES; a parquet file or folder in the Hugging Face image layout; a folder with one sub-folder a
    class, or a flat one with a CSV `id,label`; a folder of either kind may hold `train` and `test`; WebVision,
    Clothing1M or ANIMAL-10N as published, where `published` says what `labels` may be and which truth is known.
    labels: the column that is *given*; `label` beside it is then the truth. Without it the column is `label`, and the
    truth is known for the names only, whose labels count as true. image_size: resize to this square; at_most: to this
    one, what has more pixels a side. A set of more than `cache.LARGE` bytes of pixels is decoded once and from then on
    mapped from a file. The id of an image in a folder is its path relative to `source`. Raises InputError, in one line,
    for whatever cannot be loaded.
    """
    source, labels = located(source), None if labels == "label" else labels or None
    for name, side in {"image_size": image_size, "at_most": at_most}.items():
        if not 4 <= (side or 4) <= MAX_SIDE:
            raise InputError(f"{name} is {side}; it must be from 4 to {MAX_SIDE:,}")
    found, there = _scanned(source)
    one_of(f"split of {printable(source)}", split, there)
    with _in_one_line(source):
        if found is not None:
            files = [] if isinstance(found, str) else parquet.split_files(found, split)
            return (_parquet if files else _folder)(source, files or found, split, labels, image_size, at_most)
        image_set = _digits(split, labels) if source == "digits" else _torchvision(source, split, labels)
    if at_most and max(image_set.images.shape[2:]) > at_most:
        image_size = image_size or at_most
    return replace(image_set, images=decode.resized(image_set.images, image_size)) if image_size else image_set


def splits(source: str | Path) -> list[str]:
    """Return the splits `load` finds in `source`: `train`, and `test` where there is one.

    Raises InputError if there is no such source, naming those there are.
    """
    return _scanned(located(source))[1]


def _scanned(source: str) -> tuple[folders.Split | str | None, list[str]]:
    """Return (what one walk finds in a folder or parquet file, a published set's layout, None for a name; splits)."""
    if source in NAMES:
        return None, ["train", "test"]
    path = Path(source)
    with _in_one_line(source):
        if not os.path.exists(source) and (os.sep in source or "." in source):
            raise InputError(f"no such file or folder: {source}")
        if not os.path.exists(source):
            one_of("dataset", source, [*NAMES, "or a folder or parquet file"])
        if not path.is_dir() and not (path.is_file() and path.suffix == ".parquet"):
            raise InputError(f"{source} is neither a folder nor a .parquet file")
        if layout := published.detect(path):
            return layout, published.splits(path)
        found = folders.scan(path)
        both = parquet.split_files(found, "test") or len(folders.splits(found)) > 1
        return found, ["train", "test"] if both else ["train"]


def located(source: str | Path) -> str:
    """Return where `source` is: as it is if it is a name or there, otherwise below the data root if it is there."""
    source = str(source)
    if source in NAMES or not source or os.path.exists(source):
        return source
    below = os.path.join(os.environ.get("PTGLAB_DATA") or "data", source)
    return below if os.path.exists(below) else source


def check_labels(source: str | Path, labels: str | None = None) -> None:
    """Raise InputError unless there is such a source, with the column `labels` of given labels; no image is read."""
    source, labels = located(source), None if labels == "label" else labels or None
    found, _ = _scanned(source)
    with _in_one_line(source):
        if source == "digits":
            one_of("label column of digits", labels or "label", ["label"])
        elif found is None:
            _human_labels(source, "train", labels)
        elif isinstance(found, str):
            published.class_names(Path(source), labels)
        elif files := parquet.split_files(found, "train"):
            parquet.check(files[0], labels)
        else:
            folders.listing(folders.splits(found)["train"], labels)


@contextmanager
def _in_one_line(source: str) -> Iterator[None]:
    """Turn what the system says of `source` into InputError, and escape what names in a message may hold."""
    try:
        yield
    except OSError as error:
        what = error.filename if isinstance(error.filename, str) else source
        raise InputError(printable(f"{what} cannot be read: {error.strerror or error}")) from None
    except InputError as error:
        raise InputError(printable(str(error))) from None


def root() -> Path:
    """Return the data root: the folder PTGLAB_DATA names, or `data`. Raises InputError if PTGLAB_DATA names none."""
    named = os.environ.get("PTGLAB_DATA")
    if named and not Path(named).is_dir():
        raise InputError(f"PTGLAB_DATA names {named}, which is no folder: make it, or unset PTGLAB_DATA")
    return Path(named or "data")


def read_cifar_n(path: str | Path) -> dict[str, np.ndarray]:
    """Return the label columns of a CIFAR-10N or CIFAR-100N file, int64 [50000] each, named as `label_worse`.

    The file is a pickle: only NumPy arrays of numbers are let in, by torch's restricted unpickler.
    Raises InputError if it holds anything else, or more than its bytes.
    """
    import torch

    allowed = [np.ndarray, np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.int32))]
    rebuild = np._core.multiarray._reconstruct
    allowed += [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        if (size := os.path.getsize(path)) > MAX_LABELS:
            raise ValueError(f"{size} bytes")
        with torch.serialization.safe_globals(allowed):
            columns = torch.load(path, weights_only=True)
        if sum(values.nbytes for values in columns.values()) > size:  # an array may be announced, and not be there
            raise ValueError("arrays of more bytes than the file has")
        # `clean_label`, `worse_label`, `random_label1` become `label`, `label_worse`, `label_random1`
        names = {name: f"label_{name.replace('_label', '')}".removesuffix("_clean") for name in columns}
        return {names[name]: np.asarray(values, np.int64) for name, values in columns.items()}
    except Exception as error:  # whatever a foreign pickle makes the unpickler say; torch's advice is to trust it
        raise InputError(f"{path} is no CIFAR-N label file, a dictionary of whole-number NumPy arrays: it was not "
                         f"loaded ({type(error).__name__})") from None  # fmt: skip


def _digits(split: str, labels: str | None) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 to 16 x 16; a fixed stratified fifth is the test."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    one_of("label column of digits", labels or "label", ["label"])
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, scale_factor=2, mode="bilinear").round().to(torch.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    rows = np.sort(train if split == "train" else test)
    target = digits.target.astype(np.int64)[rows]
    return ImageSet(images[rows], target, target, [str(i) for i in range(10)], [str(i) for i in rows])


def _torchvision(name: str, split: str, labels: str | None) -> ImageSet:
    import torch
    import torchvision.datasets

    where = {"split": split} if name in ("svhn", "stl10") else {"train": split == "train"}
    folder = root()
    try:
        dataset = getattr(torchvision.datasets, TORCHVISION[name])(str(folder), download=True, **where)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} is not under {folder} and could not be downloaded ({reason}): put it there, or set "
                         "PTGLAB_DATA to the folder that holds it") from None  # fmt: skip
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:  # [N, H, W]
        images = images[:, None]
    elif images.shape[-1] == 3:  # [N, H, W, C]
        images = images.permute(0, 3, 1, 2).contiguous()
    true = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels, np.int64)
    given, clean = _human_labels(name, split, labels) or (true, true)
    if not np.array_equal(clean, true):
        raise InputError(f"{folder / CIFAR_N[name]} is in another order than {name}: its clean labels differ")
    classes = getattr(dataset, "classes", None) or range(10)
    return ImageSet(images, given, true, [str(c) for c in classes], [str(i) for i in range(len(images))])


def _human_labels(name: str, split: str, labels: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the column `labels` of the CIFAR-N file in the data root, and its clean one; None without `labels`."""
    if not labels:
        return None
    path = root() / CIFAR_N.get(name, "")
    if split != "train" or not path.is_file():
        wanted = f": it comes from {path}, which is not there" if name in CIFAR_N and split == "train" else ""
        raise InputError(f"{name} ({split}) has no label column '{labels}'{wanted}")
    columns = read_cifar_n(path)
    return columns[one_of(f"label column of {path}", labels, columns)], columns["label"]


def _parquet(source: str, files: list[Path], split: str, labels: str | None, *sizes: int | None) -> ImageSet:
    given, true, class_names = parquet.read(files, labels)
    rows, ids = np.flatnonzero(given >= 0), [str(i) for i in range(len(given))]
    if not len(rows):
        raise InputError(f"label column '{labels or 'label'}' of {files[0]} has no label in any of its rows")
    files, wanted = [Path(os.path.abspath(file)) for file in files], [ids[i] for i in rows]
    place, parts = cache.folder(source, split, labels, *sizes), parquet.blocks(files, given >= 0)
    images, originals, broken, notes = cache.images(parts, wanted, files, place, *sizes)
    broken += [(ids[i], printable(f"has no {labels or 'label'}")) for i in np.flatnonzero(given < 0)]
    rows = rows[originals.rows]
    return ImageSet(images, given[rows], None if true is None else true[rows], class_names, [ids[i] for i in rows],
                    sorted(broken, key=lambda pair: int(pair[0])), notes, originals=originals)  # fmt: skip


def _folder(source: str, found: folders.Split | str, split: str, labels: str | None, *sizes: int | None) -> ImageSet:
    parts = {} if isinstance(found, str) else folders.splits(found)
    inside = f"{split}/" if parts.get(split, found) is not found else ""
    listed = folders.listing(parts[split], labels) if parts else published.listing(Path(source), split, labels)
    files, given, true, unreadable = listed
    ids = [id for id in files if id in given]
    paths = [os.path.abspath(files[id]) for id in ids]
    place = cache.folder(source, split, labels, *sizes)
    images, originals, broken, notes = cache.images(cache.blocks(paths), ids, paths, place, *sizes)
    ids, paths = ([texts[i] for i in originals.rows] for texts in (ids, paths))
    if not parts:
        class_names = published.class_names(Path(source), labels)
    else:  # both splits number the classes alike, also one that only one of them has
        names = {given[id] for id in ids} | {true[id] for id in ids if id in true}
        for part in parts.values() if len(parts) > 1 else ():
            for column in {labels, None}:
                with suppress(InputError):
                    names.update(*(numbers.values() for numbers in folders.listing(part, column)[1:3]))
        numbers = all(name.isdecimal() and len(name) < 4300 for name in names)  # Python reads no longer ones
        class_names = sorted(names, key=lambda name: (int(name), name) if numbers else name)
    number = {name: i for i, name in enumerate(class_names)}
    labels_given = np.array([number[given[id]] for id in ids], np.int64)
    labels_true = np.array([number[true[id]] for id in ids], np.int64) if true else None
    if len(lonely := np.flatnonzero(np.bincount(labels_given) == 1)):
        notes.append(f"classes of one image, for which no other image can speak: {len(lonely):,}, the first "
                     f"'{class_names[lonely[0]]}'")  # fmt: skip
    unreadable = [(inside + id, why) for id, why in sorted(unreadable + broken)]
    return ImageSet(images, labels_given, labels_true, class_names, [inside + id for id in ids], unreadable, notes,
                    paths, originals)  # fmt: skip
