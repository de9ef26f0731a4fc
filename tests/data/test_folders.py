"""Which files an image folder holds, and what they are called."""

import os
import time
from pathlib import Path

import pytest
from expected import refused
from PIL import Image

from ptglab.data import folders
from ptglab.errors import InputError
from ptglab.data.folders import listing, printable, split_folders, walk


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


@pytest.mark.parametrize(
    "text, said", [("name,label\n", "no column 'id'"), ("id,label\n1.png,a\n1.png,b\n", "labels none")]
)
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


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a b\xa0猫صورة😀👩\u200d🚀.png", None),
        ('it\'s "1" \\n.png', None),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x00\x1b[31m\x7f\x85", r"\x00\x1b[31m\x7f\x85"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\u202egnp.exe\u202c\u2066", r"\u202egnp.exe\u202c\u2066"),
        (os.fsdecode(b"caf\xe9 \xff"), r"caf\xe9 \xff"),
        ("\ud800", r"\ud800"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == (text if shown is None else shown)
    printable(text).encode()


def test_walk_is_sorted_top_down_and_skips_what_is_hidden(tree):
    folder = tree("b/2.png", "b/a/1.png", "a/3.png", "c.png", ".git/x.png", "__MACOSX/x.png", "a/@eaDir/x.png")
    (folder / "a" / ".x.png").touch()
    (folder / "link").symlink_to("b")
    assert [id for id, _ in walk(folder)] == ["c.png", "link", "a/3.png", "b/2.png", "b/a/1.png"]


def test_names_alike_once_printed_stay_apart(tmp_path):
    names = [os.fsdecode(b"\xff.png"), "\\xff.png", "\\\\xff.png", "a\n.png", "a\\n.png"]
    for i, name in enumerate(names):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_text(str(i))
    files = listing(tmp_path, None)[0]
    assert len(files) == 5 and {Path(path).read_text() for path in files.values()} == set("01234")


def test_folders_in_folders_without_end(tmp_path):
    """Deeper than Python calls functions, and than a path may be long: what is below is out of reach, and listed."""
    here, levels = os.open(tmp_path, os.O_RDONLY), 2500
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").touch()
    inner = here
    for _ in range(levels):
        os.mkdir("d", dir_fd=inner)
        inner, outer = os.open("d", os.O_RDONLY, dir_fd=inner), inner
        os.close(outer)
    os.close(inner)
    try:
        files, given, _, left_out = listing(tmp_path, None)
        assert list(files) == ["cat/1.png"] and given == {"cat/1.png": "cat"}
        assert [(len(id) > 3000, reason) for id, reason in left_out] == [(True, "cannot be opened: File name too long")]
    finally:  # pytest would remove it by recursion
        os.rename(tmp_path / "d", tmp_path / "flat")
        while (tmp_path / "flat" / "d").exists():
            os.rename(tmp_path / "flat" / "d", tmp_path / "next")
            os.rmdir(tmp_path / "flat")
            os.rename(tmp_path / "next", tmp_path / "flat")


def deny(monkeypatch, name):
    """Let no one open folders called `name`: chmod does not keep out the superuser."""
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)


def test_a_folder_that_cannot_be_opened_is_listed(tree, monkeypatch):
    folder = tree("cat/1.png", "cat/locked/2.png", "dog/3.png")
    deny(monkeypatch, "locked")
    files, _, _, left_out = listing(folder, None)
    assert set(files) == {"cat/1.png", "dog/3.png"}
    assert left_out == [("cat/locked", "cannot be opened: Permission denied")]
    deny(monkeypatch, folder.name)
    with pytest.raises(PermissionError):
        listing(folder, None)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser opens everything")
def test_permissions(tree):
    folder = tree("cat/1.png", "cat/locked/2.png", "dog/3.png")
    (folder / "cat" / "locked").chmod(0)
    try:
        assert listing(folder, None)[3] == [("cat/locked", "cannot be opened: Permission denied")]
    finally:
        (folder / "cat" / "locked").chmod(0o700)


def test_links_lead_nowhere_but_within(tree, tmp_path_factory):
    folder = tree("cat/1.png", "dog/2.png")
    outside = tmp_path_factory.mktemp("outside") / "3.png"
    Image.new("L", (4, 4)).save(outside)
    within = {"cat/in.png": "../dog/2.png", "cat/absolute.png": folder / "dog" / "2.png"}
    without = {
        "cat/out.png": outside, "cat/gone.png": "no.png", "cat/self.png": "self.png", "cat/zero.png": "/dev/zero",
        "cat/folder.png": "../dog", "all": ".", "cat/up": "..",
    }  # fmt: skip
    for name, target in (within | without).items():
        (folder / name).symlink_to(target)
    files, given, _, left_out = listing(folder, None)
    assert set(files) == {"cat/1.png", "dog/2.png", *within} and given["cat/in.png"] == "cat"
    assert {id for id, _ in left_out} == set(without)
    reasons = dict(left_out)
    assert "out of the folder" in reasons["cat/out.png"] and "no file" in reasons["cat/self.png"]
    assert "link to a folder" in reasons["all"] == reasons["cat/folder.png"]


def test_a_split_may_be_linked_from_the_other(tree):
    folder = tree("train/cat/1.png", "test/cat/2.png")
    (folder / "test" / "cat" / "3.png").symlink_to("../../train/cat/1.png")
    assert set(listing(folder / "test", None, folder)[0]) == {"cat/2.png", "cat/3.png"}
    assert set(listing(folder / "test", None)[0]) == {"cat/2.png"}


def test_twenty_thousand_empty_files_are_listed_at_once(tmp_path):
    (tmp_path / "cat").mkdir()
    for i in range(20_000):
        (tmp_path / "cat" / f"{i}.png").touch()
    began = time.monotonic()
    assert len(listing(tmp_path, None)[0]) == 20_000
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("written", ["é.png", "e\u0301.png", " é.png ", "./é.png", ".\\e\u0301.png"])
@pytest.mark.parametrize("stored", ["é.png", "e\u0301.png"])
def test_a_csv_may_spell_an_id_otherwise(tree, written, stored):
    folder = tree(stored)
    (folder / "labels.csv").write_text(f"id,label\n{written},a\n", encoding="utf-8")
    assert listing(folder, None)[1] == {stored: "a"}


def test_the_exact_id_comes_first(tree):
    folder = tree("é.png", "e\u0301.png", " a.png", "a.png", "b\\c.png", "b/c.png")
    names = ["é.png", "e\u0301.png", " a.png", "a.png", "b\\c.png", "b/c.png"]
    lines = [f"{name},{i}\n" for i, name in enumerate(names)]
    (folder / "labels.csv").write_text("id,label\n" + "".join(lines), encoding="utf-8")
    assert listing(folder, None)[1] == {name: str(i) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["1.0", "2.0", "10.0"], ["1", "2", "10"]),
        (["1", "2.", "10.00"], ["1", "2", "10"]),
        (["1.0", "2.5", "10.0"], ["1.0", "2.5", "10.0"]),
        (["1.0", "two", "3.0"], ["1.0", "two", "3.0"]),
        (["-1.0", "2.0", "3.0"], ["-1.0", "2.0", "3.0"]),
    ],
)
def test_whole_numbers_lose_their_point_together(tree, labels, expected):
    folder = tree("0.png", "1.png", "2.png")
    lines = [f"{i}.png,{label},{label}\n" for i, label in enumerate(labels)]
    (folder / "labels.csv").write_text("id,given,label\n" + "".join(lines))
    _, given, true, _ = listing(folder, "given")
    assert list(given.values()) == list(true.values()) == expected


@pytest.mark.parametrize("name", ["labels.csv", "info/train_filelist_google.txt"])
def test_a_table_too_large_to_read_is_not_read(tmp_path, name):
    """Files with holes: they take no disk, and would take memory."""
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "x.png")
    (tmp_path / "info").mkdir()
    if name.startswith("info"):
        (tmp_path / "info" / "synsets.txt").write_text("n00000001 tench\n")
        (tmp_path / "info" / "train_filelist_flickr.txt").write_text("a 0\n")
    with open(tmp_path / name, "wb") as file:
        file.truncate(folders.MAX_TABLE + 1)
    refused(Path(name).name, "268,435,457 bytes, more than the 268,435,456")(tmp_path)
