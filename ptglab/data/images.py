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

from ptglab.data import cache, decode, folders, parquet, published, tables
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

    def take(self, rows: np.ndarray) -> "ImageSet":
        """Return the images `rows`, int64 [M], rising."""
        true = None if self.labels_true is None else self.labels_true[rows]
        files = [self.files[i] for i in rows] if self.files else ()
        originals = self.originals and self.originals._replace(rows=self.originals.rows[rows])
        return replace(self, images=self.images[rows], labels_given=self.labels_given[rows], labels_true=true,
                       ids=[self.ids[i] for i in rows], files=files, originals=originals)  # fmt: skip

    def subset(self, number: int, seed: int) -> "ImageSet":
        """Return `number` rows drawn without replacement, in order; all of them for 0 or if there are no more."""
        if not 0 < number < len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:number]))

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
    source: str | Path, split: str = "train", labels: str | None = None, image_size: int | None = None,
    at_most: int | None = None, table: str = "", id_column: str = "",
) -> ImageSet:  # fmt: skip
    """Load the images and labels of `source`.

    source: a name of NAMES; a parquet file or folder in a layout of the Hugging Face hub; a folder with one sub-folder
    a class, or with a table of ids and labels, see `tables`; a folder of any kind may hold splits; WebVision,
    Clothing1M or ANIMAL-10N as published, where `published` says what `labels` may be and which truth is known.
    split: `train` (also if it is empty), `val` or `test`, by any usual name, or `all`. labels: the column that is
    *given*; `label` beside it is then the truth. Without it the column is `label`, or one called alike, and the truth
    is known for the names only, whose labels count as true. table, id_column: the file that holds the labels of a
    folder, and its column that names the images, where neither is found by itself. image_size: resize to this square;
    at_most: to this one, what has more pixels a side. A set of more than `cache.LARGE` bytes of pixels is decoded once
    and from then on mapped from a file. The id of an image in a folder is its path relative to `source`; the last note
    is the sum of all files seen. Raises InputError, in one line, for whatever cannot be loaded.
    """
    source, labels = located(source), None if labels == "label" else labels or None
    for name, side in {"image_size": image_size, "at_most": at_most}.items():
        if not 4 <= (side or 4) <= MAX_SIDE:
            raise InputError(f"{name} is {side}; it must be from 4 to {MAX_SIDE:,}")
    found, parts = _scanned(source)
    with _in_one_line(source):
        roles = _roles(source, found, parts, split, table, id_column)
        place = cache.folder(source, roles, labels, image_size, at_most, table, id_column)
        if found is not None and isinstance(parts[roles[0]], list):
            return _parquet(found, parts, roles, labels, place, image_size, at_most)
        if found is not None:
            return _folder(source, found, parts, roles, (labels, table, id_column), place, image_size, at_most)
        image_set = _digits(*roles, labels) if source == "digits" else _torchvision(source, *roles, labels)
    if at_most and max(image_set.images.shape[2:]) > at_most:
        image_size = image_size or at_most
    return replace(image_set, images=decode.resized(image_set.images, image_size)) if image_size else image_set


def splits(source: str | Path) -> list[str]:
    """Return the splits `load` finds in `source`, such as `train`, `val` and `test`.

    What is for validation is called `test` where there is no other. Raises InputError if there is no such source,
    naming those there are.
    """
    return folders.split_names(_scanned(located(source))[1])


def _scanned(source: str) -> tuple[folders.Split | str | None, dict]:
    """Return (what one walk finds in a folder or parquet file, a published set's layout, None for a name; splits)."""
    if source in NAMES:
        return None, {"train": None, "test": None}
    path = Path(source)
    with _in_one_line(source):
        if not os.path.exists(source) and (os.sep in source or "." in source):
            raise InputError(f"no such file or folder: {source}")
        if not os.path.exists(source):
            one_of("dataset", source, [*NAMES, "or a folder or parquet file"])
        if not path.is_dir() and not (path.is_file() and path.suffix == ".parquet"):
            raise InputError(f"{source} is neither a folder nor a .parquet file")
        if layout := published.detect(path):
            return layout, dict.fromkeys(published.splits(path))
        found = folders.scan(path)
        return found, parquet.splits(found) or folders.splits(found)


def _roles(
    source: str, found: folders.Split | str | None, parts: dict, split: str, table: str, id_column: str
) -> list[str]:
    """Return the keys of `parts` that `split` stands for; of names and published sets it is one."""
    plain = not isinstance(found, folders.Split)
    if (table or id_column) and (plain or isinstance(next(iter(parts.values())), list)):
        raise InputError(f"{source} has its own labels: a table (--table, --id-column) is for folders of image files")
    return (
        [one_of(f"split of {source}", split or "train", parts)]
        if plain
        else folders.chosen(parts, split or "train", source)
    )


def located(source: str | Path) -> str:
    """Return where `source` is: as it is if it is a name or there, otherwise below the data root if it is there."""
    source = str(source)
    if source in NAMES or not source or os.path.exists(source):
        return source
    below = os.path.join(os.environ.get("PTGLAB_DATA") or "data", source)
    return below if os.path.exists(below) else source


def check_labels(
    source: str | Path, labels: str | None = None, split: str = "train", table: str = "", id_column: str = ""
) -> None:
    """Raise InputError unless there is such a source, with such labels, as `load` would; no image is read."""
    source, labels = located(source), None if labels == "label" else labels or None
    found, parts = _scanned(source)
    with _in_one_line(source):
        roles = _roles(source, found, parts, split, table, id_column)
        if source == "digits":
            one_of("label column of digits", labels or "label", ["label"])
        elif found is None:
            _human_labels(source, roles[0], labels)
        elif isinstance(found, str):
            published.class_names(Path(source), labels)
        elif isinstance(parts[roles[0]], list):
            for file in parts[roles[0]]:
                parquet.check(file, labels)
        else:
            _listed(source, found, parts, roles, (labels, table, id_column))


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


def _parquet(
    found: folders.Split, parts: dict, roles: list[str], labels: str | None, place: Path, *sizes: int | None
) -> ImageSet:
    files = [Path(os.path.abspath(file)) for role in roles for file in parts[role]]
    given, true, class_names = parquet.read(files, labels, [file for role in parts for file in parts[role]])
    rows, ids = np.flatnonzero(given >= 0), parquet.ids(files)
    if not len(rows):
        raise InputError(f"label column '{labels or 'label'}' of {files[0]} has no label in any of its rows")
    wanted, home = [ids[i] for i in rows], found.home if found.source.is_dir() else ""
    blocks = parquet.blocks(files, given >= 0, home)
    images, originals, broken, notes = cache.images(blocks, wanted, files, place, *sizes)
    why = dict(broken) | {ids[i]: printable(f"has no {labels or 'label'}") for i in np.flatnonzero(given < 0)}
    rows = rows[originals.rows]
    fates = {"used": len(rows), "unreadable": len(broken), "without a label": int((given < 0).sum())}
    notes += [*tables.oddities(class_names), folders.total("rows seen", fates)]
    if home:
        named = sum(map(len, parts.values()))
        notes += folders.accounts(found, {
            "used": len(files), "in other splits": named - len(files), "images": len(found.files) + len(found.left_out),
            "outside of the splits": len(found.parquet) - named,
        })  # fmt: skip
    return ImageSet(images, given[rows], None if true is None else true[rows], class_names, [ids[i] for i in rows],
                    [(id, why[id]) for id in ids if id in why], notes, originals=originals)  # fmt: skip


def _listed(
    source: str, found: folders.Split | str, parts: dict, roles: list[str], asked: tuple[str | None, str, str]
) -> tuple[dict, dict, dict, list, list]:
    """Return {id: path}, {id: given label}, {id: true label}, [(id, why it is left out)] and notes of the splits.

    asked: the columns of labels, the table, its column of ids, as they are given to `load`.
    """
    if isinstance(found, str):
        return *published.listing(Path(source), roles[0], asked[0]), []
    files, given, true, left_out, notes = {}, {}, {}, {}, []
    for role in roles:
        own = folders.listing(parts[role], *asked)
        known = role == roles[0] or bool(true)
        files, given, left_out = files | own[0], given | own[1], left_out | dict(own[3])
        true = true | own[2] if own[2] and known else {}
        notes += own[4]
    return files, given, true, list(left_out.items()), notes


def _folder(
    source: str, found: folders.Split | str, parts: dict, roles: list[str], asked: tuple[str | None, str, str],
    place: Path, *sizes: int | None,
) -> ImageSet:  # fmt: skip
    files, given, true, unreadable, said = _listed(source, found, parts, roles, asked)
    ids = [id for id in files if id in given]
    paths = [os.path.abspath(files[id]) for id in ids]
    images, originals, broken, notes = cache.images(cache.blocks(paths), ids, paths, place, *sizes)
    fates = {"used": len(originals.rows), "unreadable": len(broken), "without a label": len(files) - len(ids)}
    ids, paths = ([texts[i] for i in originals.rows] for texts in (ids, paths))
    if isinstance(found, str):
        class_names = published.class_names(Path(source), asked[0])
        sums = [folders.total("images listed", fates | {"left out": len(unreadable)})]
    else:  # all splits number the classes alike, also one that only one of them has
        names = {given[id] for id in ids} | {true[id] for id in ids if id in true}
        for part in parts.values() if len(parts) > 1 else ():
            for column in {asked[0], None}:
                with suppress(InputError):
                    names.update(*(texts.values() for texts in folders.listing(part, column, *asked[1:])[1:3]))
        class_names = tables.in_order(names)
        sums = folders.accounts(found, fates | folders.elsewhere(found, parts, roles))
    number = {name: i for i, name in enumerate(class_names)}
    labels_given = np.array([number[given[id]] for id in ids], np.int64)
    labels_true = np.array([number[true[id]] for id in ids], np.int64) if true else None
    if len(lonely := np.flatnonzero(np.bincount(labels_given) == 1)):
        notes.append(f"classes of one image, for which no other image can speak: {len(lonely):,}, the first "
                     f"'{class_names[lonely[0]]}'")  # fmt: skip
    notes = [*notes, *map(printable, said), *sums]
    return ImageSet(images, labels_given, labels_true, class_names, ids, sorted(unreadable + broken), notes,
                    paths, originals)  # fmt: skip
