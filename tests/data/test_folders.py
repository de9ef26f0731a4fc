"""Which files an image folder holds, what they are called, and what a CSV says of them."""

import os
from pathlib import Path

import pytest
from expected import refused
from PIL import Image

from ptglab.data import folders
from ptglab.data.folders import scan
from ptglab.text import printable


def listing(folder, labels=None):
    return folders.listing(scan(folder), labels)[:4]


@pytest.fixture
def tree(tmp_path):
    """Return a function that makes small images at the given paths, and returns the folder."""

    def make(*paths: str):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(tmp_path / path)
        return tmp_path

    return make


def test_a_source_is_walked_once(tree, monkeypatch):
    """By whoever loads it: each folder is listed once, for both splits and every column."""
    from ptglab import data

    folder, seen, scandir = tree("train/a/1.png", "train/b/2.png", "test/a/3.png"), [], os.scandir
    for split in ("train", "test"):
        (folder / split / "l.csv").write_text("id,label,given\na/1.png,a,b\na/3.png,a,b\n")
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(os.fspath(path)) or scandir(path))
    data.load(folder, labels="given")
    ours = [path for path in seen if path.startswith(str(folder)) and not path.endswith(("info", "training"))]
    assert len(set(ours)) == 6 and len([path for path in ours if path != str(folder)]) == 5


def test_a_scan_is_sorted_top_down_and_skips_what_is_hidden(tree):
    folder = tree("b/2.png", "b/a/1.png", "a/3.png", "c.png", ".git/x.png", "__MACOSX/x.png", "a/@eaDir/x.png")
    (folder / "a" / ".x.png").touch()
    (folder / "link").symlink_to("b")
    found = scan(folder)
    assert list(found.files) == ["c.png", "a/3.png", "b/2.png", "b/a/1.png"]
    assert set(found.folders) == {"a", "b", "b/a"} and list(found.closed) == [".git", "__MACOSX", "a/@eaDir", "link"]


def test_names_alike_once_printed_stay_apart(tmp_path):
    (tmp_path / "cat").mkdir()
    for i, name in enumerate([os.fsdecode(b"\xff.png"), "\\xff.png", "\\\\xff.png", "a\n.png", "a\\n.png"]):
        (tmp_path / "cat" / name).write_text(str(i))
    files = scan(tmp_path).files
    assert len(files) == 5 and {Path(path).read_text() for path in files.values()} == set("01234")


def test_a_path_longer_than_the_system_takes_is_listed(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    inner = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=inner)
        inner, outer = os.open("d" * 250, os.O_RDONLY, dir_fd=inner), inner
        os.close(outer)
    os.close(inner)
    files, given, _, left_out = listing(tmp_path)
    assert list(files) == ["cat/1.png", "dog/1.png"] and given == {"cat/1.png": "cat", "dog/1.png": "dog"}
    assert [(len(id) > 3000, reason) for id, reason in left_out] == [(True, "cannot be opened: File name too long")]


@pytest.mark.parametrize("locked", ["locked", "train"])
def test_a_folder_that_cannot_be_opened_is_listed_and_a_split_is_refused(tree, monkeypatch, locked):
    """Simulated: chmod does not keep out the superuser."""
    folder, scandir = tree("train/cat/1.png", "train/cat/locked/2.png", "train/dog/2.png", "test/dog/3.png"), os.scandir

    def denied(path):
        if os.path.basename(path) == locked:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    if locked == "train":
        refused("train", "Permission denied")(folder)
    else:
        files, _, _, left_out = listing(folder / "train")
        assert set(files) == {"cat/1.png", "dog/2.png"} and left_out == [
            ("cat/locked", "cannot be opened: Permission denied")
        ]


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
    files, given, _, left_out = listing(folder)
    assert set(files) == {"cat/1.png", "dog/2.png", *within} and given["cat/in.png"] == "cat"
    reasons = dict(left_out)
    assert reasons.keys() == set(without)
    assert "out of the folder" in reasons["cat/out.png"] and "no regular file" in reasons["cat/self.png"]
    assert "link to a folder of 1 files" in reasons["cat/folder.png"]
    assert all("read under its own name" in reasons[name] for name in ("all", "cat/folder.png", "cat/up"))


@pytest.mark.parametrize("written", ["é.png", "e\u0301.png", " é.png ", ".\\e\u0301.png"])
@pytest.mark.parametrize("stored", ["é.png", "e\u0301.png"])
def test_a_csv_may_spell_an_id_otherwise(tree, written, stored):
    folder = tree(stored)
    (folder / "labels.csv").write_text(f"id,label\n{written},a\n", encoding="utf-8")
    assert listing(folder)[1] == {stored: "a"}


def test_the_exact_id_comes_first(tree):
    names = ["é.png", "e\u0301.png", " a.png", "a.png", "b\\c.png", "b/c.png"]
    folder = tree(*names)
    lines = [f"{name},{i}\n" for i, name in enumerate(names)]
    (folder / "labels.csv").write_text("id,label\n" + "".join(lines), encoding="utf-8")
    assert listing(folder)[1] == {name: str(i) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["1.0", "2.", "10.00"], ["1", "2", "10"]),
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
def test_a_table_too_large_to_read_is_not_read(tree, name):
    """Files with holes: they take no disk, and would take memory."""
    folder = tree("a/x.png")
    (folder / "info").mkdir()
    if name.startswith("info"):
        (folder / "info" / "synsets.txt").write_text("n00000001 tench\n")
        (folder / "info" / "train_filelist_flickr.txt").write_text("a 0\n")
    with open(folder / name, "wb") as file:
        file.truncate((1 << 28) + 1)
    refused(Path(name).name, "268,435,457 bytes")(folder)


def test_printable_text_stays_and_the_rest_is_escaped():
    cases = {
        "a b\xa0猫صورة😀👩\u200d🚀.png": "a b\xa0猫صورة😀👩\u200d🚀.png",
        "a\nb\r\tc": r"a\nb\r\tc",
        "\x00\x1b[31m\x7f\x85": r"\x00\x1b[31m\x7f\x85",
        "\u202egnp.exe\u202c\u2066": r"\u202egnp.exe\u202c\u2066",
        os.fsdecode(b"caf\xe9 \xff"): r"caf\xe9 \xff",
    }
    assert {text: printable(text) for text in cases} == cases
