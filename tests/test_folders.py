"""Which files an image folder holds, and what they are called."""

import pytest
from PIL import Image

from ptglab.errors import InputError
from ptglab.folders import listing, split_folders


@pytest.fixture
def tree(tmp_path):
    """Return a function that makes small images at the given paths, and returns the folder."""

    def make(*paths: str):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(tmp_path / path)
        return tmp_path

    return make


def test_labels_are_the_first_folder(tree):
    folder = tree("cat/1.png", "cat/deep/2.png", "dog/ a 'quoted' name.png", "stray.png", ".hidden/3.png")
    files, given, true, unreadable = listing(folder, None)
    assert given == {"cat/1.png": "cat", "cat/deep/2.png": "cat", "dog/ a 'quoted' name.png": "dog"}
    assert true == {}
    assert unreadable == [("stray.png", "lies outside the class folders")]
    assert ".hidden/3.png" not in files


def test_links_are_not_followed(tree):
    folder = tree("cat/1.png", "dog/2.png")
    (folder / "cat" / "loop").symlink_to(folder, target_is_directory=True)
    assert set(listing(folder, None)[0]) == {"cat/1.png", "dog/2.png"}


def test_csv_names_given_and_true_labels(tree):
    folder = tree("1.png", "2.png", "3.png")
    (folder / "labels.csv").write_text("id,label,worker\n1.png,cat,dog\n2.png,dog,dog\n9.png,cat,cat\n")
    _, given, true, unreadable = listing(folder, "worker")
    assert given == {"1.png": "dog", "2.png": "dog"}
    assert true == {"1.png": "cat", "2.png": "dog"}
    assert {id for id, _ in unreadable} == {"3.png", "9.png"}


@pytest.mark.parametrize("text, said", [("name,label\n", "no column 'id'"), ("id,label\n1.png,a\n1.png,b\n", "twice")])
def test_bad_csv_is_named(tree, text, said):
    folder = tree("1.png")
    (folder / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        listing(folder, None)


@pytest.mark.parametrize(
    "paths, splits",
    [
        (["train/cat/1.png", "test/cat/2.png"], {"train": "train", "test": "test"}),
        (["train/cat/1.png"], {"train": "train"}),
        (["train/1.png", "bus/2.png"], {"train": "."}),  # a class called train
        (["cat/1.png"], {"train": "."}),
    ],
)
def test_splits(tree, paths, splits):
    folder = tree(*paths)
    assert split_folders(folder) == {name: folder / where for name, where in splits.items()}
