"""Image sets: one uint8 tensor of images, the labels in hand, and the true ones where they are known."""

import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from ptglab.decode import decode
from ptglab.errors import InputError, one_of
from ptglab.folders import listing, split_folders

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "svhn": "SVHN",
    "stl10": "STL10",
}
NAMES = ("digits", *TORCHVISION)
TEST_NAMES = ("test", "validation", "valid", "val")  # what a test split is called, first found wins
# Label files of CIFAR-10N and CIFAR-100N (Wei et al. 2022, arXiv 2110.12088), found in the data root
CIFAR_N = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, row by row.

    images: uint8 [N, C, H, W]; labels_given: int64 [N], all that training and detection see; labels_true: int64 [N],
    or None where nobody knows; class_names: K texts; ids: N texts, unique.
    `unreadable` lists (id, reason) of what is not among the N; `notes` says what was changed on the way in.
    `files`: the N image files of a folder; empty for what lies in other ways.
    """

    images: Tensor
    labels_given: np.ndarray
    labels_true: np.ndarray | None
    class_names: list[str]
    ids: list[str]
    unreadable: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    files: Sequence[Path] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, number: int, seed: int) -> "ImageSet":
        """Return `number` rows drawn without replacement, in order; all of them for 0 or if there are no more."""
        if not 0 < number < len(self):
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:number])
        true = None if self.labels_true is None else self.labels_true[rows]
        files = [self.files[i] for i in rows] if self.files else ()
        return replace(self, images=self.images[rows], labels_given=self.labels_given[rows], labels_true=true,
                       ids=[self.ids[i] for i in rows], files=files)  # fmt: skip

    def __str__(self) -> str:
        n, c, h, w = self.images.shape
        truth = "unknown"
        if self.labels_true is not None:
            truth = f"known ({(self.labels_true != self.labels_given).mean():.2%} of the given labels are wrong)"
        lines = [
            f"{n:,} images of {h} x {w} pixels, {c} channel{'s' * (c > 1)}; {self.num_classes} classes; truth {truth}"
        ]
        lines += self.notes
        if self.unreadable:
            lines.append(
                f"{len(self.unreadable):,} left out, the first: {self.unreadable[0][0]!r} ({self.unreadable[0][1]})"
            )
        return "\n".join(lines)


def load(
    source: str | Path,
    split: str = "train",
    labels: str | None = None,
    image_size: int | None = None,
    at_most: int | None = None,
) -> ImageSet:
    """Load the images and labels of `source`.

    source: a name of NAMES; a parquet file or folder in the Hugging Face image layout; a folder with one sub-folder a
    class, or a flat one with a CSV `id,label`; a folder of either kind may hold `train` and `test`.
    labels: the column that is *given*; `label` beside it is then the truth. Without it the column is `label`, and the
    truth is known for the names only, whose labels count as true. image_size: resize to this square; at_most: to this
    one, what has more pixels a side. The id of an image in a folder is its path relative to `source`.
    Raises InputError, in one line, for whatever cannot be loaded.
    """
    source, labels = str(source), None if labels in (None, "", "label") else labels
    if min(image_size or 4, at_most or 4) < 4:
        raise InputError(f"image_size is {image_size or at_most}; it must be at least 4")
    one_of(f"split of {source}", split, splits(source))
    if source == "digits":
        image_set = _digits(split, labels)
    elif source in TORCHVISION:
        image_set = _torchvision(source, split, labels)
    elif files := _parquet_files(Path(source), split):
        return _parquet(files, labels, image_size, at_most)
    else:
        return _folder(Path(source), split, labels, image_size, at_most)
    if at_most and max(image_set.images.shape[2:]) > at_most:
        image_size = image_size or at_most
    if image_size:
        image_set = replace(image_set, images=_resize(image_set.images, image_size))
    return image_set


def splits(source: str | Path) -> list[str]:
    """Return the splits `load` finds in `source`: `train`, and `test` where there is one.

    Raises InputError if there is no such source, naming those there are.
    """
    path = Path(source)
    if str(source) in NAMES:
        return ["train", "test"]
    if not path.exists():
        if os.sep in str(source) or "." in str(source):
            raise InputError(f"no such file or folder: {source}")
        one_of("dataset", str(source), [*NAMES, "or a folder or parquet file"])
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(f"{source} is neither a folder nor a .parquet file")
    return ["train", "test"] if _parquet_files(path, "test") or len(split_folders(path)) > 1 else ["train"]


def root() -> Path:
    """Return the data root: the folder PTGLAB_DATA names, or `data`. Raises InputError if PTGLAB_DATA names none."""
    named = os.environ.get("PTGLAB_DATA")
    if named and not Path(named).is_dir():
        raise InputError(f"PTGLAB_DATA names {named}, which is no folder: make it, or unset PTGLAB_DATA")
    return Path(named or "data")


def read_cifar_n(path: str | Path) -> dict[str, np.ndarray]:
    """Return the label columns of a CIFAR-10N or CIFAR-100N file, int64 [50000] each, named as `label_worse`.

    The file is a pickle: only NumPy arrays of numbers are let in, by torch's restricted unpickler.
    Raises InputError if it holds anything else.
    """
    reconstruct = np._core.multiarray._reconstruct
    allowed = [np.ndarray, np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.int32))]
    allowed += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            columns = torch.load(path, weights_only=True)
        columns = {name: np.asarray(values, np.int64) for name, values in columns.items()}
    except Exception as error:  # whatever a foreign pickle makes the unpickler say; torch's advice is to trust it
        raise InputError(f"{path} is no CIFAR-N label file, a dictionary of whole-number NumPy arrays: it was not "
                         f"loaded ({type(error).__name__})") from None  # fmt: skip
    return {_label_name(name): values for name, values in columns.items()}


def _label_name(name: str) -> str:
    """`worse_label`, `random_label1`, `clean_label` > `label_worse`, `label_random1`, `label`."""
    words = name.replace("_label", "")
    return "label" if words == "clean" else f"label_{words}"


def _digits(split: str, labels: str | None) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 to 16 x 16; a fixed stratified fifth is the test."""
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
    given = true
    if labels:
        path = folder / CIFAR_N.get(name, "")
        if split != "train" or not path.is_file():
            wanted = f": it comes from {path}, which is not there" if name in CIFAR_N and split == "train" else ""
            raise InputError(f"{name} ({split}) has no label column '{labels}'{wanted}")
        columns = read_cifar_n(path)
        given = columns[one_of(f"label column of {path}", labels, columns)]
        if not np.array_equal(columns["label"], true):
            raise InputError(f"{path} is in another order than {name}: its clean labels differ")
    classes = getattr(dataset, "classes", None) or range(10)
    return ImageSet(images, given, true, [str(c) for c in classes], [str(i) for i in range(len(images))])


def _parquet_files(path: Path, split: str) -> list[Path]:
    """Return the parquet files of `split`: `train.parquet`, `train-00000-of-00002.parquet`, `train/0000.parquet`."""
    if path.suffix == ".parquet":
        return [path] if split == "train" else []
    files = sorted(path.glob("**/*.parquet"))
    words = [f.stem.split("-")[0] for f in files]
    named = [w if w in ("train", *TEST_NAMES) else f.parent.name for w, f in zip(words, files, strict=True)]
    for name in TEST_NAMES if split == "test" else (split,):
        if name in named:
            return [f for f, own in zip(files, named, strict=True) if own == name]
    return []


def _parquet(files: list[Path], labels: str | None, image_size: int | None, at_most: int | None) -> ImageSet:
    try:
        tables = [pq.read_table(file) for file in files]
    except (OSError, ValueError) as error:
        raise InputError(f"{files[0]} is no readable parquet file: {str(error).splitlines()[0]}") from None
    columns = tables[0].column_names
    if "image" not in columns:
        raise InputError(f"{files[0]} has no column 'image': it has {', '.join(columns)}")
    given_name = one_of(f"label column of {files[0]}", labels or "label", [c for c in columns if c != "image"])
    names = ["label"] if given_name == "label" or "label" not in columns else ["label", given_name]
    names = names if given_name in names else [given_name]
    values = {}
    for name in names:
        array = np.concatenate([t.column(name).to_numpy() for t in tables])
        if not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"label column '{name}' of {files[0]} holds {array.dtype} (missing values?), not whole numbers"
            )
        values[name] = array.astype(np.int64)
    metadata = json.loads((tables[0].schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    listed = next((features[n]["names"] for n in (given_name, "label") if "names" in features.get(n, {})), None)
    class_names = list(listed or map(str, range(max(int(v.max(initial=-1)) for v in values.values()) + 1)))
    for name, array in values.items():
        bad = np.flatnonzero((array < 0) | (array >= len(class_names)))
        if len(bad):
            where = f"row {bad[0]} of label column '{name}' of {files[0]}"
            raise InputError(f"{where} holds {array[bad[0]]}; labels run from 0 to {len(class_names) - 1}")
    kind = tables[0].schema.field("image").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise InputError(f"column 'image' of {files[0]} holds {kind}, not a struct with the field 'bytes'")
    blobs = [(cell or {}).get("bytes") or b"" for t in tables for cell in t.column("image").to_pylist()]
    if not blobs:
        raise InputError(f"{files[0]} has no rows")
    ids = [str(i) for i in range(len(blobs))]
    images, kept, unreadable, notes = decode(blobs, ids, io.BytesIO, image_size, at_most)
    true = values["label"][kept] if labels and "label" in values else None
    return ImageSet(images, values[given_name][kept], true, class_names, [ids[i] for i in kept], unreadable, notes)


def _folder(source: Path, split: str, labels: str | None, image_size: int | None, at_most: int | None) -> ImageSet:
    folders = split_folders(source)
    files, given, true, unreadable = listing(folders[split], labels)
    ids = [id for id in files if id in given]
    images, kept, broken, notes = decode([files[id] for id in ids], ids, lambda path: path, image_size, at_most)
    ids = [ids[i] for i in kept]
    names = {given[id] for id in ids} | {true[id] for id in ids if id in true}
    for other in folders.keys() - {split}:  # both splits number the classes alike, also one that only one of them has
        names |= {*given.values(), *true.values()}
        for column in {labels, None}:
            with suppress(InputError):
                _, other_given, other_true, _ = listing(folders[other], column)
                names |= {*other_given.values(), *other_true.values()}
    class_names = _class_names(names)
    number = {name: i for i, name in enumerate(class_names)}
    labels_given = np.array([number[given[id]] for id in ids], np.int64)
    labels_true = np.array([number[true[id]] for id in ids], np.int64) if true else None
    for lonely in np.flatnonzero(np.bincount(labels_given, minlength=len(class_names)) == 1):
        notes.append(f"class '{class_names[lonely]}' has one image: no other one of its class can speak for it")
    inside = "" if folders[split] == source else f"{folders[split].name}/"
    paths, ids = [files[id] for id in ids], [inside + id for id in ids]
    unreadable = [(inside + id, reason) for id, reason in sorted(unreadable + broken)]
    return ImageSet(images, labels_given, labels_true, class_names, ids, unreadable, notes, paths)


def _class_names(names: set[str]) -> list[str]:
    """Sort numbers as numbers, everything else as text."""
    return sorted(names, key=lambda n: (int(n), n)) if all(n.isdecimal() for n in names) else sorted(names)


def _resize(images: Tensor, size: int) -> Tensor:
    """Return uint8 [N, C, size, size]."""
    blocks = [F.interpolate(b.float(), (size, size), mode="bicubic", antialias=True) for b in images.split(1024)]
    return torch.cat([b.round().clamp(0, 255).to(torch.uint8) for b in blocks])
