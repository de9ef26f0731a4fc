"""Parquet files in the layouts of the Hugging Face hub: a column of images, `{bytes, path}`, beside columns of labels.

What a column holds is said by the schema's metadata under `huggingface` where there are any, and otherwise by its type:
images may also be plain bytes, a list (its first counts), or a path to a file beside the parquet file.
"""

import functools
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ptglab.data.cache import Block, block_size
from ptglab.data.folders import ROLES, Split
from ptglab.data.tables import in_order, label_column
from ptglab.errors import InputError, one_of
from ptglab.text import printable

# A file may unpack to so many times its own size, and to so many bytes in any case; a row counts as ROW bytes at least.
# A few bytes may stand for any number of copies of an image, so that not only what a file says of itself is asked.
EXPANSION, MODEST, ROW = 100, 1 << 30, 100
BUFFER = 1 << 20  # bytes of a column that are read at a time
ROWS = 64  # that are unpacked at a time
MOST_CLASSES = 100_000  # where no names are listed; a column of larger numbers is hardly one of labels


def splits(found: Split) -> dict[str, list[Path]]:
    """Return the parquet files of each split: `train.parquet`, `train-00000-of-00002.parquet`, `train/0000.parquet`.

    A word in the name of a file, or else of the nearest folder, says which split it belongs to. Where none does, all
    are `train`, unless image files lie beside them; so are those of a folder that is itself called `.parquet`.
    """
    alone, named = found.source.suffix == ".parquet", {}
    for id, path in {} if alone else found.parquet.items():
        words = [w for part in reversed(id.split("/")) for w in re.split("[^a-z]+", part.lower()) if w in ROLES]
        if words:
            named.setdefault(ROLES[words[0]], []).append(Path(path))
    if not named and found.parquet and (alone or not found.files):
        named = {"train": [Path(path) for path in found.parquet.values()]}
    return {role: sorted(named[role]) for role in dict.fromkeys(ROLES.values()) if role in named}


def read(
    files: list[Path], labels: str | None, others: Sequence[Path] = ()
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Return (labels_given int64 [N], labels_true int64 [N] or None, class names) of `files`.

    labels: the given column; `label` beside it is then the truth, if it has no gaps. A missing given label is -1.
    Numbers are classes as they are, texts in order, numbered alike in the files of `others`. Raises InputError for
    damaged files, for those that unpack to EXPANSION times their size and more than MODEST bytes, for other columns and
    labels that are no class.
    """
    found, listed = [], []
    for file in files:
        with _opened(file) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata
            names = _columns(file, schema, labels)
            stated = sum(rows.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
            _check_size(file, max(stated, ROW * rows.num_rows))
            listed = listed or [_listed_names(file, schema, [name, *names]) for name in names]
            found.append([_values(file, schema, name, len(listed[0]) or MOST_CLASSES) for name in names])
    columns = [np.concatenate(parts) for parts in zip(*found, strict=False)]  # a truth that some lack is none
    if not len(columns[0]):
        raise InputError(f"{files[0]} has no rows")
    if not any(column.dtype == object for column in columns):
        names = listed[0] or [str(i) for i in range(1 + max(int(column.max()) for column in columns))]
        given, *true = columns
    else:
        columns = [
            column if column.dtype == object else [own[n] if own else str(n) if n >= 0 else "" for n in column]
            for column, own in zip(columns, [[*own, ""] if own else [] for own in listed], strict=False)
        ]
        known = {text for column in columns for text in column}
        for file in others:
            with suppress(InputError), _opened(file) as parquet:
                schema = parquet.schema_arrow
                known.update(map(str, _values(file, schema, _columns(file, schema, labels)[0], 0)))
        names = in_order(known - {""})
        number = {name: i for i, name in enumerate(names)} | {"": -1}
        given, *true = (np.array([number[text] for text in column], np.int64) for column in columns)
    return given, true[0] if true and true[0].min() >= 0 else None, names


def ids(files: list[Path]) -> list[str]:
    """Return the `path` of each image of `files`, where all have one and none has it twice; otherwise the row."""
    found, number = [], 0
    for file in files:
        with _opened(file) as parquet:
            name, number = _image_column(file, parquet.schema_arrow), number + parquet.metadata.num_rows
            kind = parquet.schema_arrow.field(name).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            continue
        for cells in _batches(file, name, ROWS, field=".path"):
            paths = pc.struct_field(cells, "path")
            if paths.null_count:
                break
            found += [printable(path) for path in paths.to_pylist()]
    unique = len(found) == number == len(set(found)) and all(found)
    return found if unique else [str(row) for row in range(number)]


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


def blocks(files: list[Path], wanted: np.ndarray, home: str = "") -> list[Block]:
    """Return the images of the `wanted` rows, bool [N], of `files` in blocks: row groups, small ones together.

    home: the real path of the folder below which an image may be a file of its own; without it, none may. To read a
    block raises InputError if its file is damaged, or unpacks to too much.
    """
    step, first, found = block_size(len(wanted)), 0, []
    for file in files:
        groups, begun = [], first
        with _opened(file) as parquet:
            name = _image_column(file, parquet.schema_arrow)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        for group, rows in enumerate(sizes):
            groups.append(group)
            first += rows
            if group + 1 == len(sizes) or first - begun + sizes[group + 1] > step:
                chosen = wanted[begun:first]
                found.append(Block(int(chosen.sum()), functools.partial(_images, file, name, groups, chosen, home)))
                groups, begun = [], first
    return found


def _images(file: Path, name: str, groups: list[int], wanted: Sequence[bool], home: str) -> Iterator[io.BytesIO | str]:
    """Yield the `wanted` image files of row groups, in order, ROWS at a time in memory; a missing one is empty."""
    row = 0
    for images in _batches(file, name, ROWS, groups):
        chosen = images.filter(pa.array(wanted[row : row + len(images)]))
        row += len(images)
        yield from (_image(cell, file, home) for cell in chosen.to_pylist())


def _batches(file: Path, name: str, rows: int, groups: list[int] | None = None, field: str = "") -> Iterator[pa.Array]:
    """Yield a column, or a field of it, `rows` at a time; raise InputError if the file is damaged, or is too much."""
    with _opened(file) as parquet:
        unpacked = 0
        for batch in parquet.iter_batches(rows, groups, [name + field], use_threads=False):
            cells = batch.column(name)
            cells = cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
            unpacked += max(cells.nbytes, ROW * len(cells))
            _check_size(file, unpacked)
            yield cells


def _image(cell: object, file: Path, home: str) -> io.BytesIO | str:
    """Return the image file of a cell of `file`: its bytes, or without them the path of a file below `home`."""
    cell = cell[0] if isinstance(cell, list) and cell else cell
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content and home and isinstance(cell, dict) and (path := cell.get("path")) and "\0" not in path:
        path = os.path.realpath(os.path.join(os.path.dirname(file), path))
        if path.startswith(home):
            return path
    return io.BytesIO(content if isinstance(content, bytes) else b"")


def _check_size(file: Path, unpacked: int) -> None:
    size = file.stat().st_size
    if unpacked > (allowed := max(MODEST, EXPANSION * size)):
        raise InputError(f"{file} has {size:,} bytes and unpacks to more than {allowed:,}: it is not read")


def _columns(file: Path, schema: pa.Schema, labels: str | None) -> list[str]:
    """Return the label columns to read, the given one first. Raises InputError if there is no such one, or no image."""
    column, times = Counter(schema.names).most_common(1)[0] if schema.names else ("", 0)
    if times > 1:
        raise InputError(f"{file} has two columns '{column}'")
    image, features = _image_column(file, schema), _features(schema)
    others = [name for name in schema.names if name != image]
    classes = [name for name in others if features.get(name, {}).get("_type") == "ClassLabel"]
    if not labels and "label" not in others and len(classes) == 1:
        return classes
    given = label_column(file, others, labels) or one_of(f"label column of {file}", "label", others)
    return [given, "label"] if labels and given != "label" and "label" in others else [given]


def _image_column(file: Path, schema: pa.Schema) -> str:
    """Return the name of the column of images: what the metadata call so, or what is of such a type."""
    features, kinds = _features(schema), {}
    for field in schema:
        feature = features.get(field.name, {})
        inner = feature.get("feature", feature)
        if kind := _kind(field.type):
            kinds[field.name] = "a marked" if isinstance(inner, dict) and inner.get("_type") == "Image" else kind
    best = [name for name, kind in kinds.items() if kind == min(kinds.values())]
    if not best:
        held = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in list(schema)[:20])
        raise InputError(f"{file} has no column 'image' of bytes, or of structs with the binary field 'bytes': it has "
                         f"{held or 'none'}")  # fmt: skip
    if len(best) > 1 and "image" not in best:
        raise InputError(f"{file} has several columns of images ({', '.join(best[:20])}): call the one that counts "
                         "'image'")  # fmt: skip
    return "image" if "image" in best else best[0]


def _kind(of: pa.DataType) -> str:
    """Return how a type holds images, the surer the earlier in the alphabet; "" if it holds none."""
    if pa.types.is_list(of) or pa.types.is_large_list(of):
        return _kind(of.value_type)
    if pa.types.is_struct(of):
        inner = {field.name: field.type for field in of}
        if _kind(inner.get("bytes", pa.null())):
            return "bytes in a struct"
        return "path" * pa.types.is_string(inner.get("path", pa.null()))
    of = of.value_type if pa.types.is_dictionary(of) else of
    return "bytes of its own" * (pa.types.is_binary(of) or pa.types.is_large_binary(of))


def _values(file: Path, schema: pa.Schema, name: str, classes: int) -> np.ndarray:
    """Return a label column as int64 [N], -1 where it is missing, or of texts [N], "" where it is missing.

    Raises InputError if it holds anything else, or numbers that are no class.
    """
    kind, where = schema.field(name).type, f"label column '{name}' of {file}"
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{where} holds {str(kind)[:60]}, neither texts nor whole numbers from 0")
    if text:
        return np.array([printable((v or "").strip()) for part in _batches(file, name, ROWS) for v in part.to_pylist()],
                        object)  # fmt: skip
    kind = kind if pa.types.is_integer(kind) else pa.float64()
    column = pa.chunked_array([part.cast(kind) for part in _batches(file, name, ROWS << 8)], kind)
    missing = column.is_null(nan_is_null=True).to_numpy()
    values = np.where(missing, 0, column.fill_null(0).to_numpy())
    missing |= values == -1
    bad = np.flatnonzero(~missing & ((values < 0) | (values >= classes) | (values != np.floor(values))))
    if len(bad):
        raise InputError(f"row {bad[0]} of {where} holds {values[bad[0]]}; labels are whole numbers from 0 to "
                         f"{classes - 1:,}: is it a column of labels?")  # fmt: skip
    return np.where(missing, -1, values.astype(np.int64))


def _features(schema: pa.Schema) -> dict[str, dict]:
    """Return what Hugging Face's metadata say of each column, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = {name: f[0] if isinstance(f, list) else f for name, f in features.items() if f}
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except Exception:  # there are none, or they are not as Hugging Face writes them
        return {}


def _listed_names(file: Path, schema: pa.Schema, columns: list[str]) -> list[str]:
    """Return the class names that the metadata list for the first of `columns` that has any, or none."""
    features = _features(schema)
    listed = next((names for c in columns if isinstance(names := features.get(c, {}).get("names"), list)), [])
    found = [printable(str(name)) for name in listed]
    if twice := next((name for name, times in Counter(found).items() if times > 1), None):
        raise InputError(f"{file} lists the class name '{twice}' twice: each should be its own")
    return found
