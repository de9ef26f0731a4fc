"""Parquet files in the Hugging Face image layout: `image: {bytes, path}` beside columns of whole-number labels."""

import functools
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ptglab.data.cache import Block, block_size
from ptglab.data.folders import Split
from ptglab.errors import InputError, one_of
from ptglab.text import printable

TEST_NAMES = ("test", "validation", "valid", "val")  # what a test split is called, first found wins
# A file may unpack to so many times its own size, and to so many bytes in any case; a row counts as ROW bytes at least.
# A few bytes may stand for any number of copies of an image, so that not only what a file says of itself is asked.
EXPANSION, MODEST, ROW = 100, 1 << 30, 100
BUFFER = 1 << 20  # bytes of a column that are read at a time
ROWS = 64  # that are unpacked at a time
MOST_CLASSES = 100_000  # where no names are listed; a column of larger numbers is hardly one of labels


def split_files(found: Split, split: str) -> list[Path]:
    """Return the parquet files of `split`: `train.parquet`, `train-00000-of-00002.parquet`, `train/0000.parquet`.

    A file, or a folder that is itself called `.parquet`, is all `train`.
    """
    files = sorted(map(Path, found.parquet.values()))
    words = [f.stem.split("-")[0] for f in files]
    named = [w if w in ("train", *TEST_NAMES) else f.parent.name for w, f in zip(words, files, strict=True)]
    for name in TEST_NAMES if split == "test" else (split,):
        if name in named and found.folder.is_dir():
            return [f for f, own in zip(files, named, strict=True) if own == name]
    return files if found.folder.suffix == ".parquet" and split == "train" else []


def read(files: list[Path], labels: str | None) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Return (labels_given int64 [N], labels_true int64 [N] or None, class names) of `files`.

    labels: the given column; `label` beside it is then the truth, if it has no gaps. A missing given label is -1.
    Raises InputError for damaged files, for those that unpack to EXPANSION times their size and more than MODEST bytes,
    for other columns and labels that are no class.
    """
    tables = []
    for file in files:
        with _opened(file) as parquet:
            names, rows = _columns(file, parquet.schema_arrow, labels), parquet.metadata
            stated = sum(rows.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
            _check_size(file, max(stated, ROW * rows.num_rows))
            batches = parquet.iter_batches(ROWS << 8, columns=names, use_threads=False)
            schema = pa.schema([parquet.schema_arrow.field(name) for name in names], parquet.schema_arrow.metadata)
            tables.append(pa.Table.from_batches((batch.select(names) for batch in batches), schema))
    if not sum(len(table) for table in tables):
        raise InputError(f"{files[0]} has no rows")
    names = [n for n in tables[0].column_names if all(n in t.column_names for t in tables)]
    class_names = _listed_names(tables[0].schema, [labels or "label", "label"])
    columns = {n: np.concatenate([_numbers(f, t, n, len(class_names) or MOST_CLASSES)
                                  for f, t in zip(files, tables, strict=True)]) for n in names}  # fmt: skip
    given, true = columns[labels or "label"], columns.get("label") if labels else None
    top = max(int(column.max()) for column in columns.values())
    return given, None if true is None or true.min() < 0 else true, class_names or [str(i) for i in range(top + 1)]


def check(file: Path, labels: str | None) -> None:
    """Raise InputError unless `file` holds images and the label column `labels`; its rows are not read."""
    with _opened(file) as parquet:
        _columns(file, parquet.schema_arrow, labels)


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    """Open `file`, to be read as a stream; raise InputError for whatever Arrow says of a damaged one."""
    try:  # Arrow opens no name that is not UTF-8
        with open(file, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False, buffer_size=BUFFER) as parquet:
            yield parquet
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes Arrow say
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{file} is no readable parquet file: {reason}") from None


def blocks(files: list[Path], wanted: np.ndarray) -> list[Block]:
    """Return the images of the `wanted` rows, bool [N], of `files` in blocks: row groups, small ones together.

    To read a block raises InputError if its file is damaged, or unpacks to too much.
    """
    step, first, found = block_size(len(wanted)), 0, []
    for file in files:
        groups, begun = [], first
        with _opened(file) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        for group, rows in enumerate(sizes):
            groups.append(group)
            first += rows
            if group + 1 == len(sizes) or first - begun + sizes[group + 1] > step:
                chosen = wanted[begun:first]
                found.append(Block(int(chosen.sum()), functools.partial(_images, file, groups, chosen)))
                groups, begun = [], first
    return found


def _images(file: Path, groups: list[int], wanted: Sequence[bool]) -> Iterator[io.BytesIO]:
    """Yield the `wanted` image files of row groups, in order, ROWS at a time in memory; a missing one is empty."""
    with _opened(file) as parquet:
        unpacked, row = 0, 0
        for batch in parquet.iter_batches(ROWS, groups, ["image.bytes"], use_threads=False):
            images = pc.struct_field(batch.column("image"), "bytes")
            unpacked += max(images.nbytes, ROW * len(images))
            _check_size(file, unpacked)
            chosen = images.filter(pa.array(wanted[row : row + len(images)]))
            row += len(images)
            yield from (io.BytesIO(image or b"") for image in chosen.to_pylist())


def _check_size(file: Path, unpacked: int) -> None:
    size = file.stat().st_size
    if unpacked > (allowed := max(MODEST, EXPANSION * size)):
        raise InputError(f"{file} has {size:,} bytes and unpacks to more than {allowed:,}: it is not read")


def _columns(file: Path, schema: pa.Schema, labels: str | None) -> list[str]:
    """Return the label columns to read, the given one first. Raises InputError if there is no such one, or no image."""
    names = schema.names
    if "image" not in names:
        raise InputError(f"{file} has no column 'image': it has {', '.join(names[:20]) or 'none'}")
    column, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(f"{file} has two columns '{column}'")
    kind = schema.field("image").type
    inner = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if "bytes" not in inner or not (pa.types.is_binary(inner["bytes"]) or pa.types.is_large_binary(inner["bytes"])):
        raise InputError(f"column 'image' of {file} holds {str(kind)[:60]}, not a struct with the binary field 'bytes'")
    given = one_of(f"label column of {file}", labels or "label", [n for n in names if n != "image"])
    return [given, "label"] if given != "label" and "label" in names else [given]


def _numbers(file: Path, table: pa.Table, name: str, classes: int) -> np.ndarray:
    """Return the label column as int64 [N], -1 where it is missing. Raises InputError if it holds anything else."""
    column, where = table.column(name), f"label column '{name}' of {file}"
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{where} holds {str(kind)[:60]}, not whole numbers from 0")
    column = column if pa.types.is_integer(kind) else column.cast(pa.float64())
    missing = column.is_null(nan_is_null=True).to_numpy()
    values = np.where(missing, 0, column.fill_null(0).to_numpy())
    bad = np.flatnonzero((values < 0) | (values >= classes) | (values != np.floor(values)))
    if len(bad):
        raise InputError(f"row {bad[0]} of {where} holds {values[bad[0]]}; labels are whole numbers from 0 to "
                         f"{classes - 1:,}: is it a column of labels?")  # fmt: skip
    return np.where(missing, -1, values.astype(np.int64))


def _listed_names(schema: pa.Schema, columns: list[str]) -> list[str]:
    """Return the class names that Hugging Face's metadata list for the first of `columns` that has any, or none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        listed = next(features[c]["names"] for c in columns if "names" in features.get(c, {}))
        return [printable(str(name)) for name in listed]
    except Exception:  # there are none, or they are not as Hugging Face writes them
        return []
