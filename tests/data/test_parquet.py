"""Parquet files: which belong to a split, what is read of them, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import parquet as content
from expected import refused

from ptglab.data import parquet
from ptglab.errors import InputError

BLOBS = [b"a", b"bc", None, b""]


def write(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(*args, **kwargs))
    return path


def test_what_is_read(tmp_path):
    """Of two files, in order; a missing image is empty, a missing given label -1."""
    first = write(tmp_path / "1.parquet", BLOBS, given=[0, 1, None, 2], label=[2, 1, 0, 0], more=["x"] * 4)
    second = write(tmp_path / "2.parquet", [b"d"], given=pa.array([1], pa.uint8()), label=[1])
    blobs, given, true, names = parquet.read([first, second], "given")
    assert blobs == [b"a", b"bc", b"", b"", b"d"] and names == ["cat", "dog", "owl"]
    assert given.dtype == true.dtype == np.int64
    assert given.tolist() == [0, 1, -1, 2, 1] and true.tolist() == [2, 1, 0, 0, 1]
    blobs, given, true, _ = parquet.read([first], None)
    assert given.tolist() == [2, 1, 0, 0] and true is None


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint16(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.bool_()]
)
@pytest.mark.parametrize("gap", [False, True])
def test_labels_of_any_kind_of_number(tmp_path, kind, gap):
    array = pa.array([1, 0, 1, None if gap else 0]).cast(pa.float32()).cast(kind)
    path = write(tmp_path / "x.parquet", BLOBS, label=array)
    assert parquet.read([path], None)[1].tolist() == [1, 0, 1, -1 if gap else 0]


def test_a_truth_with_gaps_is_none(tmp_path):
    path = write(tmp_path / "x.parquet", BLOBS, given=[0, 1, 1, 1], label=[0, None, 1, 2])
    assert parquet.read([path], "given")[2] is None


def test_a_truth_that_only_one_file_has_is_none(tmp_path):
    first = write(tmp_path / "1.parquet", BLOBS, given=[0, 1, 1, 1], label=[0, 0, 1, 2])
    second = write(tmp_path / "2.parquet", BLOBS, given=[0, 1, 1, 2])
    assert parquet.read([first, second], "given")[2] is None


@pytest.mark.parametrize(
    "features, expected",
    [
        ({"label": {"names": ["a", "b"]}}, ["a", "b"]),
        ({"label": {"names": ["a\n", 2]}}, [r"a\n", "2"]),
        ({"given": {"names": ["c", "d"]}, "label": {"names": ["a", "b"]}}, ["c", "d"]),
        ({"label": {"dtype": "int64"}}, ["0", "1"]),
        ({"label": None}, ["0", "1"]),
        ([], ["0", "1"]),
    ],
)
def test_class_names(tmp_path, features, expected):
    metadata = json.dumps({"info": {"features": features}})
    path = write(tmp_path / "x.parquet", BLOBS, metadata, given=[0, 1, 1, 1], label=[0, 1, 1, 0])
    assert parquet.read([path], "given")[3] == expected


def test_a_column_of_numbers_is_not_one_of_classes(tmp_path):
    """It would make as many class names as the largest number."""
    path = write(tmp_path / "x.parquet", BLOBS, "{}", label=[1, 2, 3, 10**12])
    refused("'label'", "holds 1000000000000", "one of labels?", call=parquet.read)([path], None)
    path = write(tmp_path / "x.parquet", BLOBS, "{}", label=[1, 2, 3, 999])
    assert len(parquet.read([path], None)[3]) == 1000


def test_types_in_messages_are_short(tmp_path):
    wide = pa.array([{f"field{i}": i for i in range(500)}])
    path = write(tmp_path / "x.parquet", image=wide, label=[0])
    with pytest.raises(ValueError, match=r"^.{0,250}$"):
        parquet.read([path], None)


def outcome(call, *args):
    """Return what `call` is refused with, "" if it is not."""
    try:
        call(*args)
    except InputError as error:
        return str(error)
    return ""


CHECKED = {
    "both": dict(blobs=BLOBS, label=[0, 1, 1, 1], given=[1, 0, 1, 1]),
    "given only": dict(blobs=BLOBS, given=[1, 0, 1, 1]),
    "no labels": dict(blobs=BLOBS),
    "text for an image": dict(image=pa.array(["a", "b"]), label=[0, 1]),
    "no bytes": dict(image=pa.array([{"path": "a"}]), label=[0]),
    "bytes that are text": dict(image=pa.array([{"bytes": "a"}]), label=[0]),
}


@pytest.mark.parametrize("case", CHECKED)
@pytest.mark.parametrize("labels", [None, "given", "gven"])
def test_a_check_refuses_what_reading_would(tmp_path, case, labels):
    path = write(tmp_path / "x.parquet", **CHECKED[case])
    found = outcome(parquet.check, path, labels)
    assert found == outcome(parquet.read, [path], labels)
    fine = {"both": [None, "given"], "given only": ["given"]}
    assert (not found) == (labels in fine.get(case, []))
    if labels == "gven" and case in fine:
        refused(f"unknown label column of {path} 'gven'", "did you mean 'given'", call=parquet.check)(path, labels)


@pytest.mark.parametrize("damage", ["missing", "empty", "no end", "other"])
def test_a_check_of_a_damaged_file_is_one_line(tmp_path, damage):
    path = write(tmp_path / "x.parquet", BLOBS, label=[0, 1, 1, 1])
    left = {"empty": b"", "no end": path.read_bytes()[:-9], "other": b"id,label\n1,2\n", "missing": None}[damage]
    path.unlink() if left is None else path.write_bytes(left)
    refused(f"{path} is no readable parquet file: ", call=parquet.check)(path, None)
    assert outcome(parquet.check, path, None) == outcome(parquet.read, [path], None)


@pytest.mark.parametrize("name", ["né .parquet", "a\n%20#?.parquet", "\udcff.parquet"], ids=ascii)
def test_a_check_takes_any_name_of_a_file(tmp_path, name):
    path = write(tmp_path / name, BLOBS, label=[0, 1, 1, 1])
    assert outcome(parquet.check, path, None) == outcome(parquet.read, [path], None) == ""


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
        return [path.relative_to(tmp_path).as_posix() for path in parquet.split_files(source, split)]

    assert found(tmp_path, "train") == ["b/train/x.parquet", "train-0.parquet"]
    assert found(tmp_path, "test") == ["val/y.parquet"]
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
    refused("x.parquet has", "unpacks to more than 10,000,000", call=parquet.read)([path], None)


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
    assert len(parquet.read([path], None)[0][0]) == 300_000


def test_other_columns_are_not_unpacked(tmp_path):
    """Nor are the paths that stand beside the images, or a column that is called as the images are, below one."""
    path = write(tmp_path / "x.parquet", BLOBS, label=[0, 1, 2, 0], **{"image.bytes": ["x"] * 4, "label.x": [9] * 4})
    blobs, given, _, _ = parquet.read([path], None)
    assert blobs == [b"a", b"bc", b"", b""] and given.tolist() == [0, 1, 2, 0]
