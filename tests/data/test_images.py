"""Loading: every layout against planted images and labels, and every way to ask for what is not there."""

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from expected import refused
from PIL import Image
from sklearn.datasets import load_digits

from ptglab import data
from ptglab.data import cache, decode, folders
from ptglab.errors import InputError


def picture(value):
    """An 8 x 8 image that can be told from every other one by its first channel."""
    return Image.new("RGB", (8, 8), (value, 255 - value, 9))


def write_images(folder, table):
    """Write {relative path: value of the picture}."""
    for name, value in table.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(folder / name)
    return folder


def flat(folder, text, images=("a.png", "b.png", "c.png", "sub/d.png"), encoding="utf-8"):
    """Write images of the values 0, 1, 2, ... and a CSV."""
    write_images(folder, {name: i for i, name in enumerate(images)})
    (folder / "labels.csv").write_text(text, encoding=encoding)
    return folder


def write_parquet(path, pixels, names=None, **columns):
    """Write a file in the Hugging Face layout; `pixels` are the values of the pictures, or bytes, or None."""

    def blob(value):
        buffer = io.BytesIO()
        picture(value).save(buffer, "PNG")
        return buffer.getvalue()

    cells = [None if p is None else {"bytes": p if isinstance(p, bytes) else blob(p), "path": None} for p in pixels]
    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = {"image": {"_type": "Image"}} | {c: {"dtype": "int64", "_type": "Value"} for c in columns}
    features |= {column: {"names": texts, "_type": "ClassLabel"} for column, texts in (names or {}).items()}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": image} | columns).replace_schema_metadata(metadata), path)
    return path


def values(image_set):
    return image_set.images[:, 0, 0, 0].tolist()


def names_given(image_set):
    return [image_set.class_names[i] for i in image_set.labels_given]


# ---- digits


def test_digits_are_split_once_and_for_all():
    train, test = data.load("digits"), data.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(int(i) for i in train.ids + test.ids) == list(range(1797))
    for image_set in (train, test):
        assert image_set.images.dtype == torch.uint8 and image_set.images.shape[1:] == (1, 16, 16)
        assert image_set.class_names == [str(i) for i in range(10)] and image_set.labels_given.dtype == np.int64
    whole, fifth = (np.bincount(labels) for labels in (load_digits().target, test.labels_given))
    assert abs(fifth - whole / 5).max() <= 1
    again = data.load("digits", "test", labels="label")
    assert again.ids == test.ids and torch.equal(again.images, test.images)


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_those_of_sklearn_enlarged(split):
    """Against the definition of bilinear interpolation, one axis after the other."""
    image_set, source = data.load("digits", split), load_digits()
    weights = np.zeros((16, 8))
    for out in range(16):
        centre = min(7, max(0, (out + 0.5) / 2 - 0.5))
        low = min(6, int(centre))
        weights[out, low], weights[out, low + 1] = 1 - (centre - low), centre - low
    rows = [int(i) for i in image_set.ids]
    expected = weights @ (source.images[rows] * 255 / 16) @ weights.T
    assert abs(image_set.images[:, 0].numpy() - expected).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(image_set.labels_given, source.target[rows])
    np.testing.assert_array_equal(image_set.labels_true, source.target[rows])


@pytest.mark.parametrize("size", [8, 32])
def test_image_size_resizes_as_pillow_does(digits, size):
    """In real numbers: in bytes Pillow also cuts to 0..255 between the two axes."""
    resized = data.load("digits", image_size=size)
    assert resized.images.shape == (1437, 1, size, size) and resized.images.dtype == torch.uint8
    for i in (0, 1, 1023, 1024, 1436):
        image = Image.fromarray(digits.images[i, 0].float().numpy()).resize((size, size), Image.BICUBIC)
        assert abs(resized.images[i, 0].numpy() - np.array(image).clip(0, 255)).max() <= 0.5 + 1e-2


@pytest.mark.parametrize("at_most, side", [(8, 8), (99, 16)])
def test_digits_shrink_to_at_most(at_most, side):
    assert data.load("digits", at_most=at_most).images.shape[2:] == (side, side)


# ---- what is not there, and where a source lies


def test_what_is_not_there_is_named(tmp_path):
    refused("unknown dataset 'cifr10'", "did you mean 'cifar10'", "digits")("cifr10")
    refused("no such file or folder: no/where")("no/where")
    refused("no such file or folder: x.parquet")("x.parquet")
    refused("'tset'", "did you mean 'test'")("digits", "tset")
    refused("'labl'", "did you mean 'label'")("digits", labels="labl")
    refused("image_size is 3", "from 4 to 4,096")("digits", image_size=3)
    refused("at_most is 5000", "from 4 to 4,096")("digits", image_size=8, at_most=5000)
    refused("unknown dataset ''")("")
    write_images(tmp_path, {"a/1.png": 1})
    refused("unknown split", "'test'", "there are train")(tmp_path, "test")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Return (here, root): the working folder and the data root, each with a folder `both` and one of its own."""
    here, root = tmp_path / "here", tmp_path / "root"
    for value, (folder, names) in enumerate([(here, "both here digits"), (root, "both there digits cifar10")]):
        for name in names.split():
            write_images(folder / name, {"a/1.png": value, "b/1.png": value + 2})
    monkeypatch.chdir(here)
    monkeypatch.setenv("PTGLAB_DATA", str(root))
    return here, root


def test_a_source_is_a_name_or_here_or_below_the_data_root(places, monkeypatch):
    here, root = places
    for source in ("both", "here/a", str(root / "there"), "digits", "cifar10", "", "nowhere", str(here / "nowhere")):
        assert data.located(source) == source
    assert data.located("there/b/1.png") == str(root / "there/b/1.png")
    assert data.located(root / "there") == data.located("there") == str(root / "there")
    assert len(data.load("digits")) == 1437 and data.splits("cifar10") == ["train", "test"]  # names win over folders
    assert values(data.load("./digits")) == values(data.load("both")) == [0, 2]
    assert values(data.load("there")) == [1, 3] and data.load("there").ids == ["a/1.png", "b/1.png"]
    data.check_labels("there")
    refused("no label column 'given'", call=data.check_labels)("there", "given")
    refused("unknown dataset 'their'")("their")
    refused("unknown dataset 'their'", call=data.check_labels)("their")
    assert data.root() == root
    root.rename(here / "data")
    refused("PTGLAB_DATA names", "unset PTGLAB_DATA")("cifar10")
    for unset in (lambda: monkeypatch.setenv("PTGLAB_DATA", ""), lambda: monkeypatch.delenv("PTGLAB_DATA")):
        unset()
        assert str(data.root()) == "data"
        assert data.located("there") == "data/there" and data.located("both") == "both"


def test_what_the_system_says_of_a_source_is_one_line(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    (tmp_path / "a\nb").mkdir()
    refused(r"a\nb cannot be read: Permission denied")(tmp_path / "a\nb")
    refused("Permission denied", call=data.splits)(tmp_path)


# ---- checking labels without reading images


def outcome(call, *args):
    """Return what `call` is refused with, "" if it is not."""
    try:
        call(*args)
    except InputError as error:
        return str(error)
    return ""


OWN, GIVEN = {None, "", "label"}, {"given"}
CHECKED = {  # how it is made, and which columns it has
    "classes": (lambda p: write_images(p, {"a/1.png": 1, "b/1.png": 2}), OWN),
    "csv": (lambda p: flat(p, "id,label,given\na.png,x,y\nb.png,y,x\n"), OWN | GIVEN),
    "csv without label": (lambda p: flat(p, "id,given\na.png,x\nb.png,y\n"), GIVEN),
    "bad csv": (lambda p: flat(p, "picture,given\na.png,x\n"), set()),
    "another csv": (lambda p: flat(p, "file,given\na.png,x\n"), GIVEN),
    "train and test": (lambda p: (flat(p / "train", "id,label,given\na.png,x,y\nb.png,y,x\n"),
                                  flat(p / "test", "id,label\na.png,x\n")), OWN | GIVEN),
    "animal10n": (lambda p: write_images(p, {"training/0_1.png": 1, "training/3_1.png": 2, "testing/0_1.png": 3}), OWN),
    "parquet": (lambda p: write_parquet(p / "train.parquet", [1, 2], label=[0, 1], given=[1, 0]), OWN | GIVEN),
    "no parquet": (lambda p: (p.mkdir(), (p / "train.parquet").write_bytes(b"PAR1")), set()),
    "images only": (lambda p: write_images(p, {"a.png": 1, "b.png": 2}), set()),
    "not there": (lambda p: None, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKED)
@pytest.mark.parametrize("labels", [None, "", "label", "given", "gven"])
def test_labels_are_refused_as_loading_would_and_no_image_is_read(tmp_path, monkeypatch, case, labels):
    source, (make, columns) = tmp_path / "source", CHECKED[case]
    make(source)
    expected = outcome(lambda: data.load(source, labels=labels))
    assert bool(expected) == (labels not in columns)
    monkeypatch.setattr(cache, "images", None)
    assert outcome(data.check_labels, source, labels) == expected


# ---- torchvision names, with its classes replaced, and CIFAR-N


class Fake:
    """Stands in for a torchvision data set; the instance of the class attributes that a test sets."""

    error = None

    def __init__(self, root, download, **where):
        assert download and os.path.isdir(root)
        type(self).where = where
        if self.error:
            raise self.error


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function that replaces a torchvision class by one with the given attributes."""
    monkeypatch.setenv("PTGLAB_DATA", str(tmp_path))

    def replace(name, **attributes):
        cls = type(name, (Fake,), attributes)
        monkeypatch.setattr(torchvision.datasets, name, cls)
        return cls

    return replace


@pytest.mark.parametrize("kind", [URLError, lambda text: RuntimeError(f"downloading a.gz:\n{text}\n")])
def test_without_a_network_the_error_says_where_to_put_the_data(fake, tmp_path, kind):
    fake("FashionMNIST", error=kind("[Errno -3] Temporary failure in name resolution"))
    refused("fashion_mnist", str(tmp_path), "name resolution", "PTGLAB_DATA")("fashion_mnist")


RANDOM = np.random.default_rng(0)
LAYOUTS = {  # name: class, array, axes of one channel of image i, where the labels lie, more attributes
    "fashion_mnist": ("FashionMNIST", (5, 28, 27), lambda a, i, c: a[i], "targets"),
    "cifar10": ("CIFAR10", (5, 32, 31, 3), lambda a, i, c: a[i, :, :, c], "targets"),
    "svhn": ("SVHN", (5, 3, 32, 31), lambda a, i, c: a[i, c], "labels"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_layouts(fake, name, split):
    cls, shape, channel, attribute = LAYOUTS[name]
    array, labels = RANDOM.integers(0, 256, shape, np.uint8), [3, 1, 0, 2, 3]
    classes = {} if name == "svhn" else {"classes": list("abcd")}
    stored = torch.as_tensor(array) if name == "fashion_mnist" else array
    dataset = fake(cls, data=stored, **{attribute: labels}, **classes)
    image_set = data.load(name, split)
    assert dataset.where == ({"split": split} if name == "svhn" else {"train": split == "train"})
    channels = 1 if len(shape) == 3 else 3
    assert image_set.images.shape[:2] == (5, channels) and image_set.images.is_contiguous()
    for i in range(5):
        for c in range(channels):
            np.testing.assert_array_equal(image_set.images[i, c].numpy(), channel(array, i, c))
    assert image_set.labels_given.tolist() == image_set.labels_true.tolist() == labels
    assert image_set.class_names == (list("abcd") if classes else [str(i) for i in range(10)])


COLUMNS = ["clean_label", "aggre_label", "worse_label", "random_label1", "random_label2", "random_label3"]


def human_file(path, dtype=np.int64, **kwargs):
    """Write a file as the authors publish it; column j of row i is (i + j) % 10."""
    torch.save({name: ((np.arange(20) + j) % 10).astype(dtype) for j, name in enumerate(COLUMNS)}, path, **kwargs)


@pytest.mark.parametrize(("dtype", "zipped"), [(np.int64, True), (np.int64, False), (np.int32, True)])
def test_cifar_n_columns(tmp_path, dtype, zipped):
    human_file(tmp_path / "h.pt", dtype, _use_new_zipfile_serialization=zipped)
    columns = data.read_cifar_n(tmp_path / "h.pt")
    assert list(columns) == ["label", "label_aggre", "label_worse", "label_random1", "label_random2", "label_random3"]
    for j, column in enumerate(columns.values()):
        assert column.dtype == np.int64
        np.testing.assert_array_equal(column, (np.arange(20) + j) % 10)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("hidden", ["value", "array of objects", "whole file"])
def test_a_malicious_pickle_does_not_run(fake, tmp_path, hidden):
    marker, path = tmp_path / "was_run", tmp_path / "CIFAR-10_human.pt"
    evil = Malicious(marker)
    content = {
        "value": {"clean_label": np.arange(3), "worse_label": evil},
        "array of objects": {"clean_label": np.array([evil], object)},
        "whole file": evil,
    }
    torch.save(content[hidden], path)
    fake("CIFAR10", data=np.zeros((20, 4, 4, 3), np.uint8), targets=[0] * 20)
    refused(str(path), "no CIFAR-N label file", call=data.read_cifar_n)(path)
    refused(str(path), "not loaded")("cifar10", labels="label_worse")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


@pytest.mark.parametrize("content", [b"", b"id,label\n1,2\n", None], ids=["empty", "a text", "missing"])
def test_what_is_no_label_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "h.pt").write_bytes(content)
    refused("h.pt is no CIFAR-N label file", call=data.read_cifar_n)(tmp_path / "h.pt")


def test_human_labels_of_cifar10(fake, tmp_path):
    """`check_labels` looks at the file of people's labels alone: nothing is downloaded."""
    pixels, clean = np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 10
    fake("CIFAR10", error=AssertionError())
    for labels in (None, "", "label"):
        data.check_labels("cifar10", labels)
    fake("CIFAR10", data=pixels, targets=clean.tolist(), classes=[str(i) for i in range(10)])
    for call in (data.load, data.check_labels):
        wanted = str(tmp_path / "CIFAR-10_human.pt")
        refused("label_worse", wanted, "not there", call=call)("cifar10", labels="label_worse")
    human_file(tmp_path / "CIFAR-10_human.pt")
    image_set = data.load("cifar10", labels="label_worse")
    np.testing.assert_array_equal(image_set.labels_given, (clean + 2) % 10)
    np.testing.assert_array_equal(image_set.labels_true, clean)
    for call in (data.load, data.check_labels):
        refused("'label_worst'", "did you mean 'label_worse'", call=call)("cifar10", labels="label_worst")
    with pytest.raises(InputError, match=r"cifar10 \(test\) has no label column 'label_worse'$"):  # no file is missing
        data.load("cifar10", "test", labels="label_worse")
    fake("CIFAR10", data=pixels, targets=clean[::-1].tolist())
    refused("CIFAR-10_human.pt is in another order than cifar10")("cifar10", labels="label_worse")
    fake("FashionMNIST", data=torch.zeros(2, 4, 4), targets=[0, 1])
    refused("fashion_mnist (train) has no label column 'label_worse'")("fashion_mnist", labels="label_worse")


# ---- parquet


def test_parquet_given_and_true_columns(tmp_path):
    names = {"label": ["cat", "dog", "owl"], "label_worse": ["cat", "dog", "owl"]}
    path = write_parquet(tmp_path / "x.parquet", [5, 6, 7], names, label=[0, 1, 1], label_worse=[2, 1, 0])
    plain = data.load(path)
    assert values(plain) == [5, 6, 7] and plain.ids == ["0", "1", "2"]
    assert plain.class_names == ["cat", "dog", "owl"] and names_given(plain) == ["cat", "dog", "dog"]
    assert plain.labels_true is None
    worse = data.load(path, labels="label_worse")
    assert worse.labels_given.tolist() == [2, 1, 0] and worse.labels_true.tolist() == [0, 1, 1]
    assert "3 images of 8 x 8 pixels, 3 channels; 3 classes" in str(worse) and "66.67% of the given" in str(worse)
    refused("unknown label column", str(path), "'label_wose'", "'label_worse'?")(path, labels="label_wose")


def test_damaged_images_and_missing_labels_of_parquet_are_listed(tmp_path):
    pixels = [5, b"no image", 7, None, b"", 9, 10]
    columns = dict(label=[0, 1, 2, 3, 4, 5, 0], other=[5, 4, 3, 2, 1, 0, None])
    image_set = data.load(write_parquet(tmp_path / "x.parquet", pixels, **columns), labels="other")
    assert values(image_set) == [5, 7, 9] and image_set.ids == ["0", "2", "5"]
    assert image_set.labels_given.tolist() == [5, 3, 0] and image_set.labels_true.tolist() == [0, 2, 5]
    assert [id for id, _ in image_set.unreadable] == ["1", "3", "4", "6"]
    assert image_set.unreadable[-1][1] == "has no other"
    assert "4 left out, the first: '1' (not an image)" in str(image_set)


SPLIT_FILES = {  # name: files of train, files of test
    "two files": (["train.parquet"], ["test.parquet"]),
    "shards": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ["data/test-00000.parquet"]),
    "folders": (["default/train/0000.parquet", "default/train/0001.parquet"], ["default/test/0000.parquet"]),
    "validation": (["train.parquet"], ["validation-00000-of-00001.parquet"]),
    "a root called train": (["train/train.parquet"], ["train/test.parquet"]),
}


@pytest.mark.parametrize("case", SPLIT_FILES)
def test_parquet_splits(tmp_path, case):
    train, test = SPLIT_FILES[case]
    for i, name in enumerate(train):
        write_parquet(tmp_path / name, [2 * i, 2 * i + 1], label=[0, i])
    for name in test:
        write_parquet(tmp_path / name, [100, 101, 102], label=[0, 1, 1])
    source = tmp_path / train[0].split("/")[0] if "root" in case else tmp_path
    assert data.splits(source) == ["train", "test"]
    assert values(data.load(source)) == list(range(2 * len(train)))
    assert data.load(source).labels_given.tolist() == [0, 0, 0, 1][: 2 * len(train)]
    assert values(data.load(source, "test")) == [100, 101, 102]


# ---- image folders


def test_one_sub_folder_a_class(tmp_path):
    write_images(tmp_path, {
        "wild cat/b.png": 2, "wild cat/a.PNG": 1, "Übung/deep/er/x.bmp": 3, "猫/1.png": 4, "猫/2 3.png": 5,
        ".cache/no.png": 6, "猫/.hidden.png": 7, "stray.png": 8,
    })  # fmt: skip
    (tmp_path / "猫" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    image_set = data.load(tmp_path)
    assert image_set.class_names == ["wild cat", "Übung", "猫"]
    rows = dict(zip(image_set.ids, zip(values(image_set), names_given(image_set), strict=True), strict=True))
    assert rows == {
        "wild cat/a.PNG": (1, "wild cat"), "wild cat/b.png": (2, "wild cat"), "Übung/deep/er/x.bmp": (3, "Übung"),
        "猫/1.png": (4, "猫"), "猫/2 3.png": (5, "猫"),
    }  # fmt: skip
    assert image_set.unreadable == [("stray.png", "lies outside the class folders")]
    assert [note for note in image_set.notes if "'Übung'" in note]
    assert image_set.labels_true is None and "truth unknown" in str(image_set)
    refused("no label column 'given'", "no CSV")(tmp_path, labels="given")


def test_number_folders_sort_as_numbers(tmp_path):
    write_images(tmp_path, {"10/a.png": 1, "9/b.png": 2, "1/c.png": 3, "01/d.png": 4})
    image_set = data.load(tmp_path)
    assert image_set.class_names == ["01", "1", "9", "10"]
    assert ": 4, the first '01'" in image_set.notes[1]


def test_a_damaged_image_takes_its_label_along(tmp_path):
    write_images(tmp_path, {f"{c}/{i}.png": 10 * i for c in "ab" for i in range(3)} | {"c/0.png": 90})
    (tmp_path / "a" / "1.png").write_bytes(b"")
    (tmp_path / "c" / "0.png").write_bytes(b"")
    image_set = data.load(tmp_path, image_size=12)
    assert image_set.ids == ["a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert values(image_set) == [0, 20, 0, 10, 20] and names_given(image_set) == list("aabbb")
    assert [id for id, _ in image_set.unreadable] == ["a/1.png", "c/0.png"]
    assert image_set.images.shape == (5, 3, 12, 12) and image_set.class_names == ["a", "b"]


def test_train_and_test_folders_number_their_classes_alike(tmp_path):
    write_images(tmp_path / "train", {"a/1.png": 1, "b/1.png": 2, "c/1.png": 3})
    write_images(tmp_path / "test", {"a/1.png": 4, "c/1.png": 5, "d/1.png": 6})
    train, test = data.load(tmp_path), data.load(tmp_path, "test")
    assert data.splits(tmp_path) == ["train", "test"]
    assert train.class_names == test.class_names == list("abcd")
    assert values(train) == [1, 2, 3] and names_given(train) == list("abc")
    assert train.ids[0] == "train/a/1.png" and test.ids[0] == "test/a/1.png"  # relative to the source
    assert values(test) == [4, 5, 6] and names_given(test) == list("acd")


def test_train_and_test_folders_with_a_csv_each(tmp_path):
    """The test folder has no column `noisy`: only the training labels are wrong."""
    write_images(tmp_path / "train", {"1.png": 1, "2.png": 2})
    write_images(tmp_path / "test", {"1.png": 3})
    (tmp_path / "train" / "l.csv").write_text("id,label,noisy\n1.png,b,c\n2.png,c,c\n")
    (tmp_path / "test" / "l.csv").write_text("id,label\n1.png,a\n")
    train, test = data.load(tmp_path, labels="noisy"), data.load(tmp_path, "test")
    assert train.class_names == test.class_names == ["a", "b", "c"]
    assert train.labels_given.tolist() == [2, 2] and train.labels_true.tolist() == [1, 2]
    assert test.labels_given.tolist() == [0]


@pytest.mark.parametrize("split", [True, False])
def test_the_files_are_those_of_the_rows(tmp_path, split):
    """Also after damaged ones are left out, in a subset, and of names that cannot be printed."""
    inside = "train/" if split else ""
    names = {f"{inside}{c}/{name}.png": 7 * i for i, c in enumerate("ab") for name in ("1", "2\n", "3\udcff", "4")}
    names = {name: 10 + i for i, name in enumerate(names)}
    write_images(tmp_path, names | ({"test/a/9.png": 200} if split else {}))
    (tmp_path / inside / "a" / "1.png").write_bytes(b"no image")
    whole = data.load(tmp_path)
    assert len(whole) == 7 and whole.unreadable == [(f"{inside}a/1.png", "not an image")]
    for image_set in (whole, whole.subset(4, seed=3)):
        paths = [Path(file).relative_to(tmp_path) for file in image_set.files]
        assert [names[path.as_posix()] for path in paths] == values(image_set)
        assert [id.split("/")[-2] for id in image_set.ids] == [path.parent.name for path in paths]
    assert rf"{inside}b/2\n.png" in whole.ids and rf"{inside}b/3\xff.png" in whole.ids
    assert data.load("digits").files == ()


@pytest.mark.parametrize(("module", "name"), [(folders, "listing"), (decode, "layout")])
def test_an_image_that_vanishes_is_listed(tmp_path, monkeypatch, module, name):
    """Before its header is read, or its pixels."""
    write_images(tmp_path, {f"{c}/{i}.png": 10 * i for c in "ab" for i in range(3)})
    original = getattr(module, name)

    def vanish(*args):
        result = original(*args)
        (tmp_path / "a" / "1.png").unlink()
        return result

    monkeypatch.setattr(module, name, vanish)
    image_set = data.load(tmp_path)
    assert image_set.ids == ["a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert [id for id, _ in image_set.unreadable] == ["a/1.png"] and "No such file" in image_set.unreadable[0][1]


# ---- flat folders with a CSV


def test_a_second_column_makes_label_the_truth(tmp_path):
    text = "id,label,given\na.png,10,9\nb.png,9,9\nc.png,100,10\nsub/d.png,10,10\n"
    image_set = data.load(flat(tmp_path, text), labels="given")
    assert image_set.class_names == ["9", "10", "100"]
    assert image_set.labels_given.tolist() == [0, 0, 1, 1] and image_set.labels_true.tolist() == [1, 0, 2, 1]
    refused("unknown label column", "labels.csv", "'gven'", "did you mean 'given'")(tmp_path, labels="gven")
    (tmp_path / "labels.csv").write_text(text.replace("b.png,9", "b.png,"))
    assert data.load(tmp_path, labels="given").labels_true is None  # it has gaps


# ---- subsets and fingerprints


def test_a_subset_keeps_rows_together(tmp_path):
    n = 40
    labels, given = np.arange(n) % 7, np.arange(n) % 5
    image_set = data.load(write_parquet(tmp_path / "x.parquet", range(n), label=labels, given=given), labels="given")
    few = image_set.subset(15, seed=1)
    rows = values(few)
    assert len(few) == len(set(rows)) == 15 and rows == sorted(rows)
    assert [int(id) for id in few.ids] == rows
    np.testing.assert_array_equal(few.labels_given, given[rows])
    np.testing.assert_array_equal(few.labels_true, labels[rows])
    assert few.class_names == image_set.class_names and few.num_classes == 7
    assert image_set.subset(15, seed=1).ids == few.ids != image_set.subset(15, seed=2).ids
    assert image_set.subset(0, seed=1) is image_set.subset(n, seed=1) is image_set.subset(n + 1, seed=1) is image_set


def painted(n=5, shape=(3, 6, 7), seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (n, *shape), np.uint8))
    return data.ImageSet(images, rng.integers(0, 3, n), None, list("abc"), [f"{i}.png" for i in range(n)])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fingerprint_tells_sets_apart(channels):
    one = painted(shape=(channels, 6, 7))
    pixel, labels = one.images.clone(), one.labels_given.copy()
    pixel[3, -1, 5, 6] ^= 1
    labels[2] = (labels[2] + 1) % 3
    turned = one.images.reshape(5, channels, 7, 6)
    others = [
        dict(images=pixel), dict(labels_given=labels), dict(ids=[*one.ids[:4], "x.png"]), dict(class_names=list("abd")),
        dict(class_names=["a", "b", "c", "d"]), dict(images=turned), dict(images=one.images.flip(0)),
        dict(ids=one.ids[::-1]), dict(images=one.images[:, :, :5]), dict(ids=["0.png1", ".png", *one.ids[2:]]),
    ]  # fmt: skip
    prints = [one.fingerprint, *(replace(one, **other).fingerprint for other in others), one.subset(4, 0).fingerprint]
    assert len(set(prints)) == len(prints) and all(re.fullmatch("[0-9a-f]{64}", p) for p in prints)


def test_a_fingerprint_is_of_the_content_alone():
    one, same = painted(), painted()
    strided = torch.empty(5, 6, 7, 3, dtype=torch.uint8).permute(0, 3, 1, 2).copy_(one.images)
    known = replace(same, images=strided, labels_true=one.labels_given, notes=["resized"], unreadable=[("x", "y")])
    narrow = replace(one, labels_given=one.labels_given.astype(np.int32))
    assert one.fingerprint == same.fingerprint == known.fingerprint == narrow.fingerprint != painted(seed=1).fingerprint


@pytest.mark.parametrize("n, sampled", [(999, 1), (2000, 2), (12_345, 12)])
def test_a_fingerprint_of_many_images_samples_about_a_thousand(n, sampled):
    one = painted(n, (1, 2, 2))
    changed, unseen = one.images.clone(), one.images.clone()
    changed[sampled * 500] ^= 1
    unseen[sampled * 500 + 1] ^= 1
    assert replace(one, images=changed).fingerprint != one.fingerprint
    assert (replace(one, images=unseen).fingerprint == one.fingerprint) == (sampled > 1)
