"""Parquet files: which belong to a split, what is read of them, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import parquet as content
from expected import refused

from ptglab.data import cache, parquet
from ptglab.data.folders import scan

BLOBS = [b"a", b"bc", None, b""]


def write(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(*args, **kwargs))
    return path


def read_all(files, labels=None):
    """Return (images, given, true, class names), as loading reads them."""
    given, true, names = parquet.read(files, labels)
    images = [image.getvalue() for part in parquet.blocks(files, given > -2) for image in part.read()]
    return images, given, true, names


def test_what_is_read(tmp_path):
    """Of two files, in order; a missing image is empty, a missing given label -1. Other columns are not unpacked."""
    more = {"image.bytes": ["x"] * 4, "label.x": [9] * 4}
    first = write(tmp_path / "1.parquet", BLOBS, given=[0, 1, None, 2], label=[2, 1, 0, 0], **more)
    second = write(tmp_path / "2.parquet", [b"d"], given=pa.array([1], pa.uint8()), label=[1])
    images, given, true, names = read_all([first, second], "given")
    assert images == [b"a", b"bc", b"", b"", b"d"] and names == ["cat", "dog", "owl"]
    assert given.dtype == true.dtype == np.int64
    assert given.tolist() == [0, 1, -1, 2, 1] and true.tolist() == [2, 1, 0, 0, 1]
    _, given, true, _ = read_all([first])
    assert given.tolist() == [2, 1, 0, 0] and true is None


@pytest.mark.parametrize("step", [1, 3, 5, 100])
def test_blocks_hold_every_wanted_row_once(tmp_path, monkeypatch, step):
    monkeypatch.setattr(parquet, "block_size", lambda number: step)
    monkeypatch.setattr(parquet, "ROWS", 2)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, rows, group in zip(paths, (range(10), range(10, 23)), (3, 50), strict=True):
        table = pa.table({"image": [{"bytes": b"%d" % i} for i in rows], "label": [0 for _ in rows]})
        pq.write_table(table, path, row_group_size=group)
    wanted = np.arange(23) % 4 > 0
    blocks = parquet.blocks(paths, wanted)
    read = [[image.getvalue() for image in block.read()] for block in blocks]
    assert [len(part) for part in read] == [block.number for block in blocks]
    assert sum(read, []) == [b"%d" % i for i in range(23) if wanted[i]]
    assert len(blocks) == {1: 5, 3: 5, 5: 4, 100: 2}[step]


@pytest.mark.parametrize("second", [{"label": [0, None, 1, 2]}, {}], ids=["gaps", "missing in one file"])
def test_a_truth_with_gaps_is_none(tmp_path, second):
    paths = [write(tmp_path / "1.parquet", BLOBS, given=[0, 1, 1, 1], label=[0, 0, 1, 2])]
    paths.append(write(tmp_path / "2.parquet", BLOBS, given=[0, 1, 1, 2], **second))
    assert parquet.read(paths, "given")[1] is None


@pytest.mark.parametrize(
    "features, expected",
    [
        ({"label": {"names": ["a\n", 2]}}, [r"a\n", "2"]),
        ({"given": {"names": ["c", "d"]}, "label": {"names": ["a", "b"]}}, ["c", "d"]),
        ({"label": {"dtype": "int64"}}, ["0", "1"]),
        ([], ["0", "1"]),
    ],
)
def test_class_names(tmp_path, features, expected):
    metadata = json.dumps({"info": {"features": features}})
    path = write(tmp_path / "x.parquet", BLOBS, metadata, given=[0, 1, 1, 1], label=[0, 1, 1, 0])
    assert parquet.read([path], "given")[2] == expected


def test_a_column_of_numbers_is_not_one_of_classes(tmp_path):
    """It would make as many class names as the largest number."""
    path = write(tmp_path / "x.parquet", BLOBS, "{}", label=[1, 2, 3, 10**12])
    refused("'label'", "holds 1000000000000", "a column of labels?", call=parquet.read)([path], None)
    path = write(tmp_path / "x.parquet", BLOBS, "{}", label=[1, 2, 3, 999])
    assert len(parquet.read([path], None)[2]) == 1000


@pytest.mark.parametrize("name", ["né .parquet", "a\n%20#?.parquet", "\udcff.parquet"], ids=ascii)
def test_any_name_of_a_file(tmp_path, name):
    path = write(tmp_path / name, BLOBS, label=[0, 1, 1, 1])
    parquet.check(path, None)
    assert len(read_all([path])[0]) == 4


def test_a_check_reads_no_rows(tmp_path):
    """With all of them damaged, only reading finds out."""
    path = write(tmp_path / "x.parquet", BLOBS, label=[0, 1, 1, 1])
    content = path.read_bytes()
    footer = 8 + int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:4] + b"\xff" * (len(content) - footer - 4) + content[-footer:])
    parquet.check(path, None)
    refused("is no readable parquet file", call=parquet.read)([path], None)


def test_the_files_of_a_split(tmp_path):
    names = ["train-0.parquet", "b/train/x.parquet", "val/y.parquet", "other.parquet", ".hidden/train.parquet"]
    for name in names:
        write(tmp_path / name, [b""], label=[0])
    (tmp_path / "train-1.parquet").mkdir()

    def found(source, split):
        return [path.relative_to(tmp_path).as_posix() for path in parquet.splits(scan(source)).get(split, [])]

    assert found(tmp_path, "train") == ["b/train/x.parquet", "train-0.parquet"]
    assert found(tmp_path, "val") == ["val/y.parquet"]
    assert found(tmp_path / "other.parquet", "train") == ["other.parquet"]
    assert found(tmp_path / "other.parquet", "test") == []
    (tmp_path / "val").rename(tmp_path / "all.parquet")
    assert found(tmp_path / "all.parquet", "train") == ["all.parquet/y.parquet"]
    assert found(tmp_path / "all.parquet", "test") == found(tmp_path, "test") == []


@pytest.fixture
def modest(monkeypatch):
    """Files of any size may unpack to 10 MB, so that too much is little enough for a test."""
    monkeypatch.setattr(parquet, "MODEST", 10_000_000)


def test_copies_without_end_are_not_unpacked(tmp_path, modest):
    """200 MB in a few kilobytes, of which the file itself admits a hundredth: a dictionary of one image."""
    cells = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([bytes(100_000)], pa.binary()))
    table = pa.table({"image": pa.StructArray.from_arrays([cells], ["bytes"]), "label": np.zeros(2000, np.int64)})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, store_schema=False)
    assert path.stat().st_size < 20_000 and pq.read_metadata(path).row_group(0).total_byte_size < 200_000
    refused("x.parquet has", "unpacks to more than 10,000,000", call=read_all)([path])


def test_rows_without_end_are_not_read(tmp_path, modest):
    image = pa.nulls(200_000, pa.struct([("bytes", pa.binary())]))
    path = write(tmp_path / "x.parquet", image=image, label=np.zeros(200_000, np.int64))
    assert path.stat().st_size < 20_000
    refused("x.parquet has", "unpacks to more than", call=parquet.read)([path], None)


def test_what_a_file_says_it_unpacks_to_is_believed_if_it_is_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MODEST", 100_000)
    monkeypatch.setattr(parquet, "EXPANSION", 2)
    path = write(tmp_path / "x.parquet", [bytes(300_000)], label=[0])
    refused("x.parquet has", "unpacks to more than", call=parquet.read)([path], None)
    path = write(tmp_path / "y.parquet", [np.random.default_rng(0).bytes(300_000)], label=[0])
    assert len(read_all([path])[0][0]) == 300_000


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path / "x.parquet", BLOBS, label=[0, 1, 1, 1])
    parts = parquet.blocks([path], np.ones(4, bool))
    path.write_bytes(b"PAR1")
    refused("is no readable parquet file", call=cache.images)(parts, list("abcd"), [path], tmp_path / "cache")
