"""What people bring: folders, tables and parquet files in the forms they have, each with what it should be read as.

The table "What people bring" of tests/README.md has a row for each of KINDS and REFUSED.
"""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from expected import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ptglab import data
from ptglab.data import cache, tables
from ptglab.errors import InputError

PETS = {f"{c}/{c}{i}.png": c for c in ("cat", "dog") for i in range(2)}  # {id: label}
FLAT = {f"{i}.png": "cat" if i < 3 else "dog" for i in range(4)}


def blob(kind="PNG", value=9) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def plant(folder: Path, tree) -> None:
    """Write {path: content}; names alone are images."""
    for name in tree:
        content = tree[name] if isinstance(tree, dict) else None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else blob())


def rows(*, name=str, label=str, head="id,label", end=",") -> bytes:
    lines = [head, *(f"{name(id)}{end}{label(text)}" for id, text in FLAT.items())]
    return ("\n".join(lines) + "\n").encode()


def flat(table: bytes, name: str = "labels.csv"):
    return lambda folder: plant(folder, {id: None for id in FLAT} | {name: table})


def excel(folder: Path) -> None:
    plant(folder, FLAT.keys())
    pd.DataFrame({"Filename": FLAT.keys(), "Class": FLAT.values()}).to_excel(folder / "labels.xlsx", index=False)


def jsonl(**columns) -> bytes:
    records = ({k: make(id) for k, make in columns.items()} for id in FLAT)
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def hub(folder: Path, name: str, column: str, cells, features=None, **columns) -> None:
    table = pa.table({column: cells} | columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name)


IMAGE = [{"bytes": blob(value=i), "path": None} for i in range(4)]
NAMED = [{"bytes": blob(value=i), "path": f"{i}.png"} for i in range(4)]
ROWS = {str(i): text for i, text in enumerate(FLAT.values())}
TEXTS, NUMBERS = list(FLAT.values()), [0, 0, 0, 1]
CLASSES = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
IS = {"_type": "Image"}


def linked(folder: Path) -> None:
    plant(folder, {".store/cat/1.png": None, "dog/2.png": None})
    (folder / "cat").symlink_to(".store/cat")
    (folder / "again").symlink_to("dog")


def run_inside(folder: Path) -> None:
    plant(folder, {**PETS, "runs/audit/x/images/1.png": None, "runs/audit/x/params.json": b"{}",
                   "runs/audit/x/environment.json": b"[]"})  # fmt: skip


def splits(*names: str):
    return lambda folder: plant(folder, [f"{name}/{c}/{i}.png" for i, name in enumerate(names) for c in ("cat", "dog")])


def of(name: str, number: int = 0) -> dict[str, str]:
    return {f"{name}/{c}/{number}.png": c for c in ("cat", "dog")}


SUFFIXES = {".avif": "AVIF", ".jp2": "JPEG2000", ".jfif": "JPEG", ".jpe": "JPEG", ".tga": "TGA", ".qoi": "QOI",
            ".PCX": "PCX", ".dib": "DIB", ".pnm": "PPM", ".ico": "ICO", ".sgi": "SGI", ".apng": "PNG"}  # fmt: skip
OTHER = [f"{c}/{s[1:]}{s}" for s in SUFFIXES for c in ("cat", "dog")]

KINDS = {  # kind: (how it is made, what is given to load, {id: label} expected, words of a note)
    # folders
    "splits in any case": (splits("Training", "VAL", "Testing"), {}, of("Training"), "2 in the split val"),
    "split val by another name": (splits("train", "valid"), {"split": "validation"}, of("valid", 1), "the split tr"),
    "the only held-out split is the test": (splits("train", "Validation"), {"split": "test"}, of("Validation", 1), ""),
    "all splits": (splits("train", "eval"), {"split": "all"}, of("train") | of("eval", 1), "4 files seen = 4 used"),
    "a class called train": (lambda f: plant(f, ["train/1.png", "bus/2.png"]), {}, {"bus/2.png": "bus",
                             "train/1.png": "train"}, ""),
    "images outside the splits": (lambda f: (splits("train", "test")(f), plant(f, ["x/1.png"])), {}, of("train"),
                                  "1 outside of the splits"),
    "a table for split folders beside them": (
        lambda f: plant(f, {"train/1.png": None, "train/2.png": None, "test/1.png": None,
                            "train.csv": b"id,label\n1,cat\n2,dog\n", "sample.csv": b"id,guess\n1,cat\n"}),
        {}, {"train/1.png": "cat", "train/2.png": "dog"}, "sample.csv is not used"),
    "a table for all splits": (
        lambda f: plant(f, {"train/1.png": None, "train/2.png": None, "test/1.png": None,
                            "all.csv": b"path,label\ntrain/1.png,cat\ntrain/2.png,dog\ntest/1.png,cat\n"}),
        {}, {"train/1.png": "cat", "train/2.png": "dog"}, "1 in the split test"),
    "folders linked within": (linked, {}, {"cat/1.png": "cat", "dog/2.png": "dog"}, "2 files seen = 2 used"),
    "a run folder inside": (run_inside, {}, PETS, "1 run folders"),
    "all that Pillow reads": (lambda f: plant(f, {n: blob(SUFFIXES[os.path.splitext(n)[1]]) for n in OTHER}), {},
                              {n: n.split("/")[0] for n in OTHER}, f"{len(OTHER)} used"),
    "other endings": (lambda f: plant(f, {**PETS, "cat/a.mp4": b"", "b.HEIC": b"", "c": b"", ".d": b""}), {}, PETS,
                      "8 files seen = 4 used + 1 hidden + 1 .heic + 1 without an ending + 1 .mp4"),
    "HEIC": (lambda f: plant(f, {**PETS, "b.HEIC": b""}), {}, PETS, "1 HEIC images are not read: convert them"),
    "breeds in species": (lambda f: plant(f, [f"{s}/{b}/1.png" for s, b in ("ca", "cb", "dx", "dy")]), {},
                          {f"{s}/{b}/1.png": s for s, b in ("ca", "cb", "dx", "dy")}, "not the 4 folders in them"),
    # tables
    **{f"ids called {n}": (flat(rows(head=f"{n},label")), {}, FLAT, "5 files seen = 4 used + 1 .csv") for n in
       ("ID", "file", "Filename", "file_name", "path", "image", "image_id", "Image_Path", "name")},
    **{f"labels called {n}": (flat(rows(head=f"id,{n}")), {}, FLAT, "") for n in
       ("Label", "class", "Category", "TARGET", "breed")},
    "ids without ending": (flat(rows(name=lambda id: id[:-4])), {}, FLAT, ""),
    "ids by file name": (lambda f: plant(f, {f"a/{id}": None for id in FLAT} | {"l.csv": rows()}), {},
                         {f"a/{id}": c for id, c in FLAT.items()}, ""),
    "absolute paths": (flat(rows(name=lambda id: f"/home/me/pictures/{id}")), {}, FLAT, ""),
    "Windows paths": (lambda f: plant(f, {f"a/{id}": None for id in FLAT} | {
        "l.csv": rows(name=lambda id: f"C:\\me\\a\\{id}")}), {}, {f"a/{id}": c for id, c in FLAT.items()}, ""),
    "two columns of ids": (flat(b"id,file,label\n7,0.png,cat\n8,1.png,cat\n9,2.png,cat\n5,3.png,dog\n"), {}, FLAT, ""),
    "TSV": (flat(rows(head="id\tlabel", end="\t"), "l.tsv"), {}, FLAT, ".tsv"),
    "JSON lines": (flat(jsonl(image=str, label=FLAT.get), "l.jsonl"), {}, FLAT, ".jsonl"),
    "JSON lines of numbers": (flat(jsonl(image=str, label=lambda i: int(i[0]) // 2), "l.jsonl"), {},
                              {id: str(int(id[0]) // 2) for id in FLAT}, ""),
    "Excel": (excel, {}, FLAT, ".xlsx"),
    "Windows-1252": (flat(rows(label=lambda t: "né" if t == "cat" else t).decode().encode("cp1252")), {},
                     {id: "né" if c == "cat" else c for id, c in FLAT.items()}, "Windows-1252"),
    "one table of several": (lambda f: (flat(rows())(f), plant(f, {"b.csv": rows(label=str.upper)})),
                             {"table": "labels.csv"}, FLAT, ""),
    "other columns": (flat(rows(head="nr,kind"), "t.txt"), {"table": "t.txt", "id_column": "nr", "labels": "kind"},
                      FLAT, ""),
    "a table of something else": (lambda f: plant(f, {**PETS, "sales.csv": b"id,label\n1,2\n", "x.csv": b"\xff\0"}), {},
                                  PETS, "sales.csv is not used"),
    "one-hot columns": (flat(b"id,cat,dog,age\n0.png,1,0,3\n1.png,1,0,1\n2.png,1,0,2\n3.png,0,1,1\n"), {}, FLAT,
                        "one-hot columns"),
    "several labels in one": (flat(rows(label="{};outdoor".format)), {},
                              {id: f"{c};outdoor" for id, c in FLAT.items()}, "seem to hold several"),
    "names alike": (flat(b"id,label\n0.png,Cat\n1.png,cat\n"), {}, {"0.png": "Cat", "1.png": "cat"}, "'Cat and cat'"),
    "1.0 beside 1": (flat(b"id,label\n0.png,1.0\n1.png,1\n2.png,2\n"), {}, {"0.png": "1.0", "1.png": "1", "2.png": "2"},
                     "'1.0 and 1'"),
    "nan": (flat(b"id,label\n0.png,nan\n1.png,cat\n"), {}, {"0.png": "nan", "1.png": "cat"}, "may mean none"),
    "metadata.csv of an image folder": (
        lambda f: plant(f, {f"train/{id}": None for id in FLAT} | {"train/metadata.csv": rows(head="file_name,label"),
                                                                   "test/x/1.png": None}),
        {}, {f"train/{id}": c for id, c in FLAT.items()}, ""),
    "metadata.jsonl of captions": (lambda f: plant(f, {**PETS, "metadata.jsonl": json.dumps(
        {"file_name": "cat/cat0.png", "text": "a cat"}).encode()}), {}, PETS, "metadata.jsonl is not used"),
    # parquet
    "img of the hub": (lambda f: hub(f, "plain_text/train-00000-of-00001.parquet", "img", IMAGE,
                       {"img": IS} | CLASSES, label=NUMBERS), {}, ROWS, "4 rows seen = 4 used"),
    "any marked column": (lambda f: hub(f, "train.parquet", "x", IMAGE, {"x": IS} | CLASSES, label=NUMBERS,
                          mask=IMAGE), {}, ROWS, ""),
    "bytes": (lambda f: hub(f, "part-0.parquet", "jpg", [c["bytes"] for c in IMAGE], label=TEXTS), {}, ROWS, ""),
    "first of a list": (lambda f: hub(f, "train.parquet", "images", [[c, *IMAGE] for c in IMAGE], label=TEXTS), {},
                        ROWS, ""),
    "paths that are kept": (lambda f: hub(f, "x.parquet", "image", NAMED, label=TEXTS), {}, FLAT, ""),
    "paths without bytes": (lambda f: (plant(f, [f"sub/{id}" for id in FLAT]), hub(f, "sub/train.parquet", "image",
                            [{"bytes": None, "path": id} for id in FLAT], label=TEXTS)), {}, FLAT, "+ 4 images"),
    "another column of classes": (lambda f: hub(f, "train.parquet", "image", IMAGE,
                                  {"fine": CLASSES["label"]}, fine=NUMBERS), {}, ROWS, ""),
    "texts, some missing": (lambda f: hub(f, "train.parquet", "image", IMAGE, label=["cat", None, "", "dog"]), {},
                            {"0": "cat", "3": "dog"}, "4 rows seen = 2 used + 2 without a label"),
    "a dictionary": (lambda f: hub(f, "train.parquet", "image", IMAGE, label=pa.array(TEXTS).dictionary_encode()), {},
                     ROWS, ""),
    "-1": (lambda f: hub(f, "train.parquet", "image", IMAGE, CLASSES, label=[0, -1, None, 1]), {},
           {"0": "cat", "3": "dog"}, "2 without a label"),
    "parquet of any split": (
        lambda f: [hub(f, f"{s}-0.parquet", "image", IMAGE, label=TEXTS) for s in ("train", "validation", "test")],
        {"split": "val"}, ROWS, "3 files seen = 1 used + 2 in other splits"),
}  # fmt: skip


def labelled(image_set) -> dict[str, str]:
    names = (image_set.class_names[i] for i in image_set.labels_given)
    return dict(zip(image_set.ids, names, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_people_bring(tmp_path, kind):
    make, given, expected, said = KINDS[kind]
    make(tmp_path)
    data.check_labels(tmp_path, **given)
    image_set = data.load(tmp_path, **given)
    assert labelled(image_set) == expected
    assert any(said in note for note in image_set.notes), image_set.notes
    for note in image_set.notes:
        if " seen = " in note:
            total, *parts = (int(text.replace(",", "")) for text in re.findall(r"(?:^|= |\+ )([\d,]+) ", note))
            assert total == sum(parts), note


REFUSED = {  # kind: (how it is made, what is given to load, words of the refusal)
    "a folder too high": (lambda f: plant(f, [f"Pets/{id}" for id in PETS]), {}, ("did you mean", "/Pets?")),
    "two folders too high": (lambda f: plant(f, [f"a/Pets/{id}" for id in PETS]), {}, ("did you mean", "/a/Pets?")),
    "the same folders in all": (lambda f: plant(f, [f"{k}/{id}" for k in "ab" for id in PETS]), {},
                                ("cat, dog", "did you mean", "/a?")),
    "one class": (lambda f: plant(f, ["cat/1.png"]), {}, ("one class only, 'cat'",)),
    "classes in the names": (lambda f: plant(f, [f"all/{c}.{i}.png" for c in ("cat", "dog") for i in range(3)]), {},
                             ("one class only, 'all'", "cat, dog")),
    "only HEIC": (lambda f: plant(f, {"a/1.heic": b"x"}), {}, ("1 HEIC images", "convert")),
    "an unknown split": (splits("train", "test"), {"split": "tset"}, ("did you mean 'test'", "all")),
    "several tables": (lambda f: (flat(rows())(f), plant(f, {"b.csv": rows()})), {}, ("labels.csv", "--table")),
    "no such table": (flat(rows()), {"table": "none.csv"}, ("no such table: none.csv",)),
    "no such id column": (flat(rows()), {"id_column": "idd"}, ("'idd'", "did you mean 'id'")),
    "two columns of labels": (flat(b"id,class,category\n0.png,a,b\n"), {}, ("class, category", "--label-column")),
    "JSON that is none": (flat(b'{"id": "0.png"\n', "l.jsonl"), {}, ("line 1", "l.jsonl")),
    "Excel that is none": (flat(b"PK", "l.xlsx"), {}, ("l.xlsx", "Excel")),
    "a table for parquet": (lambda f: hub(f, "x.parquet", "image", IMAGE, label=TEXTS), {"table": "x.csv"},
                            ("has its own labels",)),
    "several columns of images": (lambda f: hub(f, "x.parquet", "a", IMAGE, label=TEXTS, b=IMAGE), {}, ("a, b",)),
    "no column of images": (lambda f: hub(f, "x.parquet", "a", [1]), {}, ("no column 'image'", "a (int64)")),
    "class names twice": (lambda f: hub(f, "x.parquet", "image", IMAGE, {"label": {"names": ["a", "a"]}},
                          label=NUMBERS), {}, ("'a' twice",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_asked_about_before_any_image_is_read(tmp_path, monkeypatch, kind):
    make, given, words = REFUSED[kind]
    make(tmp_path)
    monkeypatch.setattr(cache, "images", None)
    refused(*words)(tmp_path, **given)


def test_every_kind_has_a_row_in_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## What people bring")[2].partition("\n## ")[0]
    rows = {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")}
    names = {re.sub(r"^(ids|labels) called .*", r"\1 called", kind) for kind in KINDS | REFUSED}
    assert names - rows == set() and len(rows - names) == 2  # head and rule


def test_splits_are_named_as_they_are_asked_for(tmp_path):
    splits("Valid", "TRAIN", "eval")(tmp_path)
    assert data.splits(tmp_path) == ["train", "val", "test"]
    shutil.rmtree(tmp_path / "eval")
    assert data.splits(tmp_path) == ["train", "test"]


def test_a_link_out_is_listed_with_its_number_of_files(tmp_path):
    plant(tmp_path, [f"in/{id}" for id in PETS] + ["out/1.png", "out/a/2.png"])
    (tmp_path / "in" / "owl").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "x.parquet").symlink_to(tmp_path / "out" / "1.png")
    image_set = data.load(tmp_path / "in")
    [(id, why)] = image_set.unreadable
    assert id == "owl" and "2 files" in why and "copy" in why
    assert "1 .parquet that is a link out" in image_set.notes[-1]


def test_excel_without_openpyxl_is_refused_with_the_mend(tmp_path, monkeypatch):
    excel(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    refused("labels.xlsx", "pip install openpyxl")(tmp_path)


def test_an_excel_file_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    excel(tmp_path)
    monkeypatch.setattr(tables, "MAX_TABLE", 1000)
    refused("labels.xlsx", "unpacks to")(tmp_path)


def test_texts_are_numbered_alike_in_all_splits(tmp_path):
    for split, texts in {"train": ["b", "d"], "test": ["a", "b"]}.items():
        hub(tmp_path, f"{split}.parquet", "image", IMAGE[:2], label=texts)
    train, test = data.load(tmp_path), data.load(tmp_path, "test")
    assert train.class_names == test.class_names == ["a", "b", "d"]
    assert train.labels_given.tolist() == [1, 2] and test.labels_given.tolist() == [0, 1]
    assert data.load(tmp_path, "all").labels_given.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("given, true", [("given", "label"), ("label", "given")])
def test_a_truth_of_numbers_beside_texts(tmp_path, given, true):
    """Also where one is listed by name and the other written out."""
    columns = {given: pa.array(["dog", "cat", "cat", "dog"]), true: pa.array([0, 0, 1, 1])}
    hub(tmp_path, "train.parquet", "image", IMAGE, {true: CLASSES["label"]}, **columns)
    image_set = data.load(tmp_path, labels="given")
    labels = {"given": image_set.labels_given.tolist(), "label": image_set.labels_true.tolist()}
    assert labels == {given: [1, 0, 0, 1], true: [0, 0, 1, 1]} and image_set.class_names == ["cat", "dog"]


def test_a_text_without_end_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("ptglab.data.parquet.MODEST", 1_000_000)
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array(["x" * 100_000]))
    for i, store in enumerate((True, False)):
        table = pa.table({"image": [IMAGE[0]] * 2000, "label": texts})
        pq.write_table(table, tmp_path / f"{i}.parquet", store_schema=store)
        refused("unpacks to more than")(tmp_path / f"{i}.parquet")


# ---- the sum of files, over random sources

NAMES = st.sampled_from(["cat", "dog", "train", "Test", "val", "owl", ".hid", "run", "a b"])
LEAVES = st.sampled_from(["1.png", "2.jpg", "3.tif", "bad.png", "n.txt", "b.mp4", ".x.png", "c", "l.csv", "m.tsv",
                          "h.heic", "j.jsonl", "params.json", ".lock", "train.parquet", "part-0.parquet"])  # fmt: skip
TREES = st.sets(st.tuples(st.lists(NAMES, max_size=3).map(tuple), LEAVES), min_size=1, max_size=25)
LINKS = st.lists(st.tuples(NAMES, NAMES), max_size=2)
CONTENT = {
    ".csv": b"id,label\n1,cat\n2.jpg,dog\n3.tif,cat\n", ".tsv": b"file\tclass\ncat/1.png\tx\n",
    ".jsonl": b'{"file_name": "2.jpg", "label": 3}\n', ".json": b"{}",
}  # fmt: skip


def walked(folder: Path) -> int:
    """Return how many files there are where loading looks: not in hidden folders, run folders, or twice."""
    number, seen, below = 0, set(), [folder]
    links = []
    while below or links:
        here = below.pop() if below else links.pop(0)
        real = os.path.realpath(here)
        entries = list(os.scandir(here))
        names = {e.name for e in entries}
        if real in seen or (here != folder and {"params.json", ".lock"} <= names):
            seen.add(real)
            continue
        seen.add(real)
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                below += [entry.path] * (entry.name[0] != ".")
            elif entry.is_symlink() and entry.is_dir() and entry.name[0] != ".":
                links.append(entry.path)
            else:
                number += 1
    return number


BASES = st.sampled_from([[], ["cat/0.png", "dog/0.png"], [f"{s}/{c}/0.png" for s in ("train", "test") for c in "ab"]])


def test_files_seen_are_used_or_listed_by_reason(tmp_path):
    loaded = []

    @settings(database=None, deadline=None, derandomize=True, max_examples=120,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(base=BASES, tree=TREES, links=LINKS, split=st.sampled_from(["train", "test", "all"]))
    def holds(base, tree, links, split):
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        plant(source, base or ["0.png"])
        for folders, leaf in sorted(tree):
            path = source.joinpath(*folders, leaf)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                hub(path.parent, leaf, "image", NAMED, label=["cat", None, "dog", "cat"])
            else:
                path.write_bytes(b"" if "bad" in leaf else CONTENT.get(path.suffix, blob()))
        for name, target in links:
            (source / f"link {name}").unlink(missing_ok=True)
            (source / f"link {name}").symlink_to(target)
        with contextlib.suppress(InputError):
            image_set = data.load(source, split)
            loaded.append(image_set.files == ())
            check_sums(image_set, walked(source))

    holds()
    assert len(loaded) > 60 and sum(loaded) > 10  # with parquet


def check_sums(image_set, number):
    sums = [note for note in image_set.notes if " seen = " in note]
    fates = [re.findall(r"(?:= |\+ )([\d,]+) ([^+]+)", note) for note in sums]
    for note, parts in zip(sums, fates, strict=True):
        assert int(note.split()[0]) == sum(int(number) for number, _ in parts), note
    assert image_set.notes[-1] == sums[-1] and int(sums[-1].split()[0]) == number
    assert int(fates[0][0][0]) == len(image_set) and fates[0][0][1].strip() == "used"
    named = [id for id, _ in image_set.unreadable]
    assert not {*named} & {*image_set.ids} and len(image_set.ids) == len(set(image_set.ids))
