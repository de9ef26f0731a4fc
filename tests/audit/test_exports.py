"""What is written is read back by others' readers, with names that break naive writers."""

import base64
import csv
import hashlib
import io
import json
import os
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from expected import refused
from PIL import ExifTags, Image

from ptglab import data
from ptglab.audit import exports
from ptglab.detect.suspects import Suspects
from ptglab.lab import notebooks
from ptglab.text import unescape_formula

NAMES = ["plain.png", "<img src=x onerror=alert(1)>.png", 'a,"b"\nc & d.png', "return\rhere.png",
         "javascript:alert(1).png", "100%25 #1?x=1.png", "שלום עולם\u202e.png", "caf\u0065\u0301 画像 🦊.png",
         " space and 'quotes' .png", "{{ 7 * 7 }}.png"]  # fmt: skip
CLASSES = ["</script><b>", 'x, "y"\nz', "قطة", "NA"]
FORMULAS = [
    "=1+1",
    "+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
    "＋1",
    "－1",
    "＠1",
    "=cmd|' '!A0",
    '-"x",1',
]
SAID = ["3 of 10 labels look wrong.", "Half of the <first> are."]
SUMMARY = {
    "detector": "knn",
    "unknown": "",
    "rate": 0.25,
    "low": 0.2,
    "high": 0.3,
    "flagged": 3,
    "images": 10,
    "first": [10, 0.5, 0.1, 0.9],
    "confusions": [["قطة", "NA", 3]],
}
LEFT = {"suspects.csv", "gallery.html", "label_studio.json", "label_studio.xml", "fiftyone.csv", "summary.json"}
TAGS = "html head meta title link style body header main div h1 p strong bdi details summary ol li label select option "
TAGS += "pre input output ul a img dl dt dd br script"


def suspects_of(n: int, k: int = 4) -> Suspects:
    """Return random suspects, with ties, a third of them flagged."""
    rng = np.random.default_rng(0)
    score = rng.choice(np.linspace(0, 1, n // 2 + 2), n).astype(np.float32)
    return Suspects(score, rng.random(n) < 1 / 3, rng.integers(0, k, n))


@pytest.fixture
def odd(tmp_path) -> data.ImageSet:
    """A folder of pictures with odd names, labelled with odd classes, one of them unreadable."""
    folder = tmp_path / "photos & co"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        Image.fromarray(rng.integers(0, 255, (20, 30 + i, 3), np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    with open(folder / "labels.csv", "w", encoding="utf-8", newline="") as file:
        rows = [(name, CLASSES[i % 4]) for i, name in enumerate([*NAMES, "broken.png"])]
        csv.writer(file).writerows([("id", "label"), *rows])
    image_set = data.load(folder)
    return replace(image_set, ids=[Path(file).name for file in image_set.files], class_names=sorted(CLASSES))


@pytest.fixture
def bare() -> data.ImageSet:
    """Sixty pictures of no files, 8 x 12, one channel."""
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (60, 1, 8, 12), np.uint8))
    return data.ImageSet(images, np.arange(60) % 4, None, list("abcd"), [str(i) for i in range(60)])


def opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture))


class Page(HTMLParser):
    """The tags, attributes and texts of a page, as a browser would see them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.texts, self.stack = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.stack.append(tag)

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts.append((self.stack[-1] if self.stack else "", text))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]


def test_table_has_every_row_once_the_most_suspicious_first(bare):
    suspects = suspects_of(60)
    frame = exports.table(bare, suspects)
    expected = sorted(range(60), key=lambda i: (suspects.score[i], i))
    assert frame.index.tolist() == expected and frame["score"].dtype == np.float32
    columns = {"id": [str(i) for i in expected], "given": ["abcd"[i % 4] for i in expected],
               "suggested": ["abcd"[suspects.suggested[i]] for i in expected],
               "score": suspects.score[expected].tolist(), "flagged": suspects.flagged[expected].tolist()}  # fmt: skip
    assert list(frame.columns) == list(columns) and frame.to_dict("list") == columns
    for call in (exports.table, lambda *a: exports.gallery("x.html", *a, "title", "detector")):
        refused("59 scores", "60 images", call=call)(bare, suspects_of(59))


def test_csv_comes_back_through_both_readers(odd, tmp_path):
    """Numbers are as short as they are, flags are True and False, texts what they were."""
    frame = exports.table(odd, suspects_of(len(odd)))
    exports.write_table(tmp_path / "suspects.csv", frame)
    with open(tmp_path / "suspects.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == list(frame.columns)
    assert [list(map(unescape_formula, row)) for row in rows] == frame.astype(str).to_numpy().tolist()
    read = pd.read_csv(tmp_path / "suspects.csv", dtype={"score": np.float32}, keep_default_na=False)
    pd.testing.assert_frame_equal(read, frame.reset_index(drop=True), check_dtype=False)
    assert read["flagged"].dtype == bool and set(read["id"]) == set(NAMES) and set(read["given"]) == set(CLASSES)


def test_formulas_in_names_reach_no_table(tmp_path):
    names = [*FORMULAS, "'=1", "plain"]
    n = len(names)
    image_set = data.ImageSet(torch.zeros((n, 1, 4, 4), dtype=torch.uint8), np.arange(n), None, names, names,
                              [(name, name) for name in names])  # fmt: skip
    suspects = Suspects(-np.arange(n, dtype=np.float32), np.ones(n, bool), np.roll(np.arange(n), 1))
    exports.write(tmp_path, image_set, suspects, SUMMARY, "=x")
    exports.unreadable(tmp_path, image_set)
    exports.duplicates(tmp_path, image_set, np.array([[0, 1]]), np.array([-1.0]))
    exports.outliers(tmp_path, image_set, -suspects.score, suspects.flagged)
    tables = sorted(tmp_path.glob("*.csv"))
    assert len(tables) == 5
    for table in tables:
        with open(table, encoding="utf-8", newline="") as file:
            cells = [(column, cell) for row in csv.DictReader(file) for column, cell in row.items()]
        assert cells and not [c for c in cells if c[1][:1] in "=+@\t\r\n＝＋－＠" and c[1]]
        assert {column for column, cell in cells if cell[:1] == "-"} <= {"score", "difference"}


def test_an_audit_of_an_audits_table_finds_the_same_images_and_classes(tmp_path):
    """suspects.csv, put beside the images as their labels, names them and their classes as they were."""
    for name in ("=a", "-b", "@c", "plain", "'x"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), i).save(tmp_path / "in" / name / f"{i}.png")
    first = data.load(tmp_path / "in")
    suspects = Suspects(np.zeros(10, np.float32), np.zeros(10, bool), first.labels_given)
    exports.write_table(tmp_path / "in" / "suspects.csv", exports.table(first, suspects))
    again = data.load(tmp_path / "in", labels="given")
    assert again.ids == first.ids and again.class_names == first.class_names and not again.unreadable
    assert (again.labels_given == first.labels_given).all()


def rows_of(path: Path) -> list[list]:
    """Return a table as lists, its header first."""
    read = pd.read_csv(path, keep_default_na=False)
    return [list(read.columns), *read.to_numpy().tolist()]


def test_what_is_unreadable_duplicate_or_an_outlier_is_listed(odd, bare, tmp_path):
    """Pairs that share an image are of one group; groups with a conflict come first."""
    pairs, odd = np.array([[3, 9], [1, 5], [0, 2], [8, 0]]), replace(odd, labels_given=(np.arange(10) == 5).astype(int))
    difference = np.array([0.01, 0.3, 0.1, 0.2], np.float32)
    score, flagged = np.linspace(1, 0, 10, dtype=np.float32), np.arange(10) % 4 == 0
    given, heads = [odd.class_names[k] for k in odd.labels_given], []
    exports.unreadable(tmp_path, odd)
    exports.duplicates(tmp_path, odd, pairs, difference)
    exports.outliers(tmp_path, odd, score, flagged)
    for name, expected in {
        "unreadable": [["id", "reason"], ["broken.png", "not an image"]],
        "duplicates": [["group", "id", "given", "other_id", "other_given", "difference", "conflict"],
                       *([g, odd.ids[a], given[a], odd.ids[b], given[b], d, given[a] != given[b]] for g, a, b, d in
                         [(1, 1, 5, 0.3), (2, 0, 2, 0.1), (2, 8, 0, 0.2), (3, 3, 9, 0.01)])],
        "outliers": [["id", "given", "score"], *([odd.ids[i], given[i], float(str(score[i]))] for i in (8, 4, 0))],
    }.items():  # fmt: skip
        assert rows_of(tmp_path / f"{name}.csv") == expected
        heads.append(expected[:1])
    exports.unreadable(tmp_path, bare)
    exports.duplicates(tmp_path, bare, np.empty((0, 2), np.int64), np.empty(0))
    exports.outliers(tmp_path, bare, np.zeros(60), np.zeros(60, bool))
    assert [rows_of(tmp_path / f"{name}.csv") for name in ("unreadable", "duplicates", "outliers")] == heads


def folder_of(tmp_path: Path, **files: Image.Image | bytes) -> data.ImageSet:
    """Return a set whose files are these, PNG or JPEG by what is given, with black tensors of 4 x 4."""
    paths = [tmp_path / name for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path, "JPEG" if path.name.startswith("jpeg") else "PNG")
    images = torch.zeros((len(paths), 1, 4, 4), dtype=torch.uint8)
    return data.ImageSet(images, np.zeros(len(paths), np.int64), None, ["a"], list(files), files=paths)


def test_thumbnails_keep_the_aspect_of_the_file_and_stand_upright(tmp_path):
    lying = Image.new("RGB", (200, 100), "blue")
    lying.paste("red", (0, 0, 100, 100))
    (exif := lying.getexif())[ExifTags.Base.Orientation] = 6  # to be turned clockwise: the left end becomes the top
    lying.save(file := io.BytesIO(), "JPEG", exif=exif)
    image_set = folder_of(tmp_path, wide=Image.new("RGB", (300, 150)), high=Image.new("L", (50, 400)),
                          lying=file.getvalue(), small=Image.new("RGB", (20, 10)),
                          jpeg=Image.new("RGB", (4000, 1000)))  # fmt: skip
    pictures = [opened(p) for p in exports.thumbnails(image_set, range(5))]
    assert [p.size for p in pictures] == [(128, 64), (16, 128), (64, 128), (20, 10), (128, 32)]
    assert [p.format for p in pictures] == ["JPEG", "JPEG", "JPEG", "PNG", "JPEG"]
    turned = pictures[2].convert("RGB")
    assert turned.getpixel((32, 20))[0] > 200 and turned.getpixel((32, 108))[2] > 200
    assert [p.size for p in map(opened, exports.thumbnails(image_set, [4, 0], side=32))] == [(32, 8), (32, 16)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_thumbnails_of_every_kind_of_picture_are_as_bright_as_it(mode, tmp_path):
    """Real numbers from 0 to 1 are shares of white, what is transparent lets white through, as an audit takes them."""
    value = {"RGB": (200,) * 3, "RGBA": (90, 90, 90, 85), "LA": (90, 85), "CMYK": (0, 0, 0, 55), "1": 1,
             "I;16": 200 << 8, "I": 200 << 8, "F": 200 / 255}.get(mode, 200)  # fmt: skip
    grey = Image.new("RGB", (12, 8), (200,) * 3)
    file = io.BytesIO()
    picture = grey.quantize(4) if mode == "P" else Image.new(mode, (12, 8), value)
    picture.save(file, "TIFF" if mode in ("I", "F", "CMYK") else "PNG")
    [thumbnail] = exports.thumbnails(folder_of(tmp_path, x=file.getvalue()), [0])
    assert opened(thumbnail).size == (12, 8)
    assert abs(opened(thumbnail).convert("L").getpixel((5, 5)) - (255 if mode == "1" else 200)) <= 3


def test_thumbnails_of_more_than_eight_bits_have_the_scale_of_the_set(tmp_path):
    for i, top in enumerate((4095, 800)):
        (tmp_path / "ab"[i]).mkdir()
        Image.fromarray(np.linspace(0, top, 300, dtype=np.uint16).reshape(15, 20)).save(tmp_path / "ab"[i] / f"{i}.png")
    image_set = data.load(tmp_path)
    for row, picture in enumerate(exports.thumbnails(image_set, [0, 1])):
        np.testing.assert_array_equal(np.asarray(opened(picture)), image_set.images[row, 0])
    assert image_set.images.amax((1, 2, 3)).tolist() == [255, 50]


def test_thumbnails_of_files_that_went_bad_come_from_the_tensor(tmp_path, bare):
    whole = io.BytesIO()
    Image.effect_noise((300, 300), 90).save(whole, "PNG")
    image_set = folder_of(tmp_path, bad=b"nothing", cut=whole.getvalue()[:500], gone=b"")
    image_set.files[2].unlink()
    assert [opened(p).size for p in exports.thumbnails(image_set, range(3))] == [(4, 4)] * 3
    for channels in (1, 2, 3, 7):  # exactly: its first, or first three
        images = np.random.default_rng(0).integers(0, 255, (60, channels, 9, 6), np.uint8)
        [picture] = exports.thumbnails(replace(bare, images=torch.from_numpy(images)), [0])
        expected = images[0, 0] if channels < 3 else images[0, :3].transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(opened(picture)), expected)


def test_pictures_are_files_or_put_into_a_folder(odd, bare, tmp_path):
    assert exports.pictures(tmp_path / "out", odd, [3, 1]) == [Path(odd.files[3]), Path(odd.files[1])]
    assert not (tmp_path / "out").exists()
    first, second = exports.pictures(tmp_path / "out", bare, np.array([7, 59]))
    assert first == tmp_path / "out" / "images" / "000007.png"
    np.testing.assert_array_equal(np.asarray(opened(second.read_bytes())), bare.images[59, 0])
    before = first.stat().st_mtime_ns
    exports.pictures(tmp_path / "out", bare, [7])
    assert first.stat().st_mtime_ns == before  # the same picture is not written again
    first.write_bytes(b"another")
    exports.pictures(tmp_path / "out", bare, [7])
    assert opened(first.read_bytes()).size == (12, 8)


@pytest.fixture
def page(odd, tmp_path) -> Page:
    """The gallery of the odd folder, two folders away from it."""
    (tmp_path / "runs" / "a: b").mkdir(parents=True)
    path = tmp_path / "runs" / "a: b" / "gallery.html"
    exports.gallery(path, odd, suspects_of(len(odd)), "<i>my</i> & photos", "a <detector>", SAID,
                    exports.next_steps(path.parent, odd, tmp_path / "photos & co"))  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["gallery.html"]
    return Page(path)


def test_gallery_shows_names_as_text_and_what_was_found(page, odd):
    suspects = suspects_of(len(odd))
    frame = exports.table(odd, suspects)
    shown = [text for text in page.text_of("bdi") if text.strip()]
    expected = [text for row in frame.itertuples() for text in (row.given, row.suggested, row.id)]
    assert shown == ["<i>my</i> & photos", *(text.replace("\r", "\n") for text in expected)]  # as HTML reads it
    assert page.text_of("title") == ["Suspects: <i>my</i> & photos"]
    described = [f"{row.id}, labelled {row.given}".replace("\r", "\n") for row in frame.itertuples()]
    assert [image["alt"] for image in page.all("img")] == described
    text = " ".join("".join(text for tag, text in page.texts if tag not in ("script", "style")).split())
    for words in (*SAID, "a <detector>", "torch", "1 could"):
        assert words in text
    options = page.all("option")[1 : -len(["suspicious", "pair", "id"])]
    flags = [int(option["data-flagged"]) for option in options]
    assert flags == sorted(flags, reverse=True) and sum(flags) == suspects.flagged.sum()
    assert sum(int(option["data-all"]) for option in options) == len(odd)
    assert "\u2068</script><b>\u2069" in "".join(option["data-names"] for option in options)


def test_gallery_holds_nothing_that_a_browser_would_fetch_or_run_but_its_own(page, odd, tmp_path):
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "srcset", "srcdoc", "action")]
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name == "src"]
    assert len(sources) == len(NAMES) and all(s.startswith("data:image/png;base64,") for s in sources)
    assert [link["href"] for link in page.all("link")] == ["data:,"] and page.all("script") == [{}]
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    digests = [hashlib.sha256("".join(page.text_of(tag)).encode()).digest() for tag in ("style", "script")]
    style, script = (base64.b64encode(digest).decode() for digest in digests)
    assert set(policy.split("; ")) == {
        "default-src 'none'", "base-uri 'none'", "form-action 'none'", "img-src data:", f"style-src 'sha256-{style}'",
        f"script-src 'sha256-{script}'",
    }  # fmt: skip
    for link, row in zip(page.all("a"), exports.table(odd, suspects_of(len(odd))).index, strict=True):
        url = urlsplit(link["href"])
        assert link["href"].startswith("./") and not (url.scheme or url.netloc or url.query or url.fragment)
        assert os.path.samefile(tmp_path / "runs" / "a: b" / os.fsdecode(unquote_to_bytes(url.path)), odd.files[row])


def test_gallery_is_cut_to_the_flagged_first(bare, tmp_path):
    suspects = suspects_of(60)
    frame = exports.table(bare, suspects)
    flagged = frame["flagged"].sum()
    for most in (5, flagged, 40, 60):
        exports.gallery(tmp_path / "g.html", bare, suspects, "t", "d", most=most)
        page = Page(tmp_path / "g.html")
        kept = pd.concat([frame[frame.flagged], frame[~frame.flagged]])[:most].index
        shown = [image["alt"].split(",")[0] for image in page.all("img")]
        assert shown == frame["id"][frame.index.isin(kept)].tolist()
        text = " ".join(page.text_of("p"))
        assert ("this page holds" in text) == (most < 60) and "Estimated" not in text and not page.all("a")
        assert ("the most suspicious of the flagged ones" in text) == (most < flagged)
    for flagged in (suspects.flagged, np.zeros(60, bool)):  # with nothing flagged it begins with all
        exports.gallery(tmp_path / "g.html", bare, replace(suspects, flagged=flagged), "t", "d", most=30)
        [box] = [i for i in Page(tmp_path / "g.html").all("input") if i["type"] == "checkbox"]
        assert ("checked" in box) == flagged.any()


def served(image: str, root: Path) -> Path:
    """Return the file that Label Studio, started with this document root, sends for the image of a task."""
    url = urlsplit(image)
    assert url.path == "/data/local-files/" and not url.fragment
    [path] = parse_qs(url.query, strict_parsing=True)["d"]
    return root / path


@pytest.mark.parametrize("probable", [False, True])
def test_label_studio_tasks_of_a_folder(odd, tmp_path, probable):
    """The score of a prediction is how probable the suggested label is, or the detector's."""
    (tmp_path / "run").mkdir()
    frame = exports.table(odd, suspects_of(len(odd)))
    frame = frame[frame.flagged]
    probability = np.random.default_rng(0).random(len(odd)) if probable else None
    exports.label_studio(tmp_path / "run" / "l.json", odd, suspects_of(len(odd)), probability)
    tasks, root = json.loads((tmp_path / "run" / "l.json").read_text(encoding="utf-8")), tmp_path
    for task, row in zip(tasks, frame.itertuples(), strict=True):
        assert (task["data"]["id"], task["data"]["given"]) == (row.id, row.given)
        assert served(task["data"]["image"], root).samefile(odd.files[row.Index])
        [prediction] = task["predictions"]
        assert prediction["model_version"] == f"ptglab {exports.__version__}"
        assert prediction["score"] == pytest.approx(probability[row.Index] if probable else row.score)
        [result] = prediction["result"]
        assert (result["type"], result["from_name"], result["to_name"]) == ("choices", "label", "image")
        assert result["value"] == {"choices": [row.suggested.replace("\n", "\ufffd")]}
    view = ElementTree.parse(tmp_path / "run" / "l.xml").getroot()
    [choices] = view.findall("Choices")
    assert (choices.get("name"), choices.get("toName"), choices.get("choice")) == ("label", "image", "single")
    assert [choice.get("value") for choice in choices] == [name.replace("\n", "\ufffd") for name in odd.class_names]
    assert view.find("Image").attrib == {"name": "image", "value": "$image"}


def test_label_studio_tasks_of_a_set_without_files(bare, tmp_path, monkeypatch):
    (tmp_path / "run 1").mkdir()
    monkeypatch.chdir(tmp_path)
    exports.label_studio("run 1/label_studio.json", bare, suspects_of(60))
    tasks, root = json.loads(Path("run 1/label_studio.json").read_text()), tmp_path
    assert len(tasks) == suspects_of(60).flagged.sum()
    for task in tasks:
        shown = np.asarray(opened(served(task["data"]["image"], root).read_bytes()))
        np.testing.assert_array_equal(shown, bare.images[int(task["data"]["id"]), 0])


def test_label_studio_choices_are_what_xml_can_say(bare, tmp_path):
    names = ["a\x01b", "<&'\">", "\ufffe", "\udcff"]
    exports.label_studio(tmp_path / "l.json", replace(bare, class_names=names), suspects_of(60))
    values = [c.get("value") for c in ElementTree.parse(tmp_path / "l.xml").iter("Choice")]
    assert values == ["a\ufffdb", "<&'\">", "\ufffd", r"\udcff"]
    tasks = json.loads((tmp_path / "l.json").read_text(encoding="utf-8"))
    assert {t["predictions"][0]["result"][0]["value"]["choices"][0] for t in tasks} <= set(values)


def test_fiftyone_table(odd, bare, tmp_path):
    texts = {"ground_truth": str, "suggested": str}
    exports.fiftyone(tmp_path / "fiftyone.csv", odd, suspects_of(len(odd)))
    read = pd.read_csv(tmp_path / "fiftyone.csv", keep_default_na=False, dtype=texts)
    assert list(read.columns) == ["filepath", "ground_truth", "suggested", "score", "flagged"]
    for row, expected in zip(read.itertuples(), exports.table(odd, suspects_of(len(odd))).itertuples(), strict=True):
        assert os.path.isabs(row.filepath) and os.path.samefile(row.filepath, odd.files[expected.Index])
        assert (row.ground_truth, row.suggested, row.flagged) == (expected.given, expected.suggested, expected.flagged)
    exports.fiftyone(tmp_path / "bare.csv", bare, suspects_of(60))
    read = pd.read_csv(tmp_path / "bare.csv")
    assert read["flagged"].all() and len(read) == suspects_of(60).flagged.sum()
    assert all(Path(path).parent == tmp_path / "images" and Path(path).is_file() for path in read["filepath"])


class FiftyOne(SimpleNamespace):
    """What the lines in the gallery use of FiftyOne, as a module."""

    def __init__(self):
        super().__init__(samples=[], Classification=lambda label: label, launch_app=lambda dataset: self)
        self.Sample, self.Dataset = lambda **fields: dict(fields), lambda name: self
        self.add_sample, self.wait = self.samples.append, lambda: None


def test_the_lines_that_load_it_into_fiftyone_keep_labels_like_na(odd, tmp_path, monkeypatch):
    names = ["NA", "None", "null", "1.0"]
    odd, suspects = replace(odd, class_names=names), suspects_of(len(odd))
    exports.write(tmp_path, odd, suspects, SUMMARY, tmp_path / "photos & co")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fiftyone", fake := FiftyOne())
    exec(Page(tmp_path / "gallery.html").text_of("pre")[2], {})
    for sample, row in zip(fake.samples, exports.table(odd, suspects).itertuples(), strict=True):
        assert (sample["ground_truth"], sample["suggested"]) == (row.given, row.suggested)
        assert os.path.samefile(sample["filepath"], odd.files[row.Index]) and sample["flagged"] == row.flagged


def test_the_next_steps_can_be_typed(odd, bare, tmp_path, monkeypatch):
    """In a shell, from any folder: absolute paths, quoted where need be, and parameters that notebook 7 has."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a: $b"
    for image_set, source, served in ((odd, "photos & co", tmp_path / "photos & co"), (bare, "digits", folder)):
        steps = exports.next_steps("runs/a: $b", image_set, source)
        run, lab = (shlex.split(part) for part in steps["review"].split(" && "))
        assert run[:4] == ["ptglab", "run", "07_review_suspects", str(folder / "review.ipynb")]
        values = notebooks.values("07_review_suspects", run[5::2])
        assert set(run[4::2]) == {"-p"} and lab == ["jupyter", "lab", str(folder / "review.ipynb")]
        expected = {"audit_run": str(folder), "run_dir": str(folder / "review")}
        assert values == expected | ({"dataset": str(served)} if image_set is odd else {})
        start, settings, load = steps["label_studio"].split("\n")
        assert shlex.split(start)[1] == f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={served.parent}"
        assert str(folder / "label_studio.xml") in settings and f"path {served}, then Save" in settings
        assert load.endswith(str(folder / "label_studio.json"))


def test_everything_is_written_at_once_in_the_place_of_links(odd, bare, tmp_path):
    (outside := tmp_path / "outside").write_text("mine")
    for name, image_set, source in (("files", odd, tmp_path / "photos & co"), ("bare", bare, "digits")):
        (folder := tmp_path / "runs" / name).mkdir(parents=True)
        for path in LEFT:
            (folder / path).symlink_to(outside)
        steps = exports.write(folder, image_set, suspects_of(len(image_set)), SUMMARY, source)
        assert steps == exports.next_steps(folder, image_set, source)
        assert {p.name for p in folder.iterdir()} == LEFT | ({"images"} if name == "bare" else set())
        assert not [path for path in LEFT if (folder / path).is_symlink()] and outside.read_text() == "mine"
        assert json.loads((folder / "summary.json").read_text()) == SUMMARY | {"next": steps}
        page = Page(folder / "gallery.html")
        assert page.text_of("title") == [f"Suspects: {Path(source).name}"]
        assert page.text_of("pre")[:2] == [steps["review"], steps["label_studio"]]
        assert "20.0% to 30.0%" in (folder / "gallery.html").read_text(encoding="utf-8")


def test_bytes_that_are_no_text_pass_everywhere(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (5, 5)).save(file)
    image_set = data.ImageSet(
        torch.zeros((1, 3, 5, 5), dtype=torch.uint8), np.zeros(1, np.int64), None, ["a\udce9", "b\ud800"],
        [file.name], [("\udcff.png", "reason \udcfe")], files=[file],
    )  # fmt: skip
    exports.unreadable(tmp_path, image_set)
    exports.duplicates(tmp_path, image_set, np.zeros((1, 2), int), np.zeros(1))
    exports.outliers(tmp_path, image_set, np.zeros(1), np.ones(1, bool))
    exports.write(tmp_path, image_set, Suspects(np.zeros(1, np.float32), np.ones(1, bool), np.ones(1, int)), SUMMARY,
                  os.fsdecode(b"t\xe9"))  # fmt: skip
    for name in LEFT | {"unreadable.csv", "duplicates.csv", "outliers.csv"}:
        (tmp_path / name).read_text(encoding="utf-8")
    assert (tmp_path / "suspects.csv").read_text().splitlines()[1] == r'"caf\udce9.png","a\udce9","b\ud800",0.0,True'
    assert [link["href"] for link in Page(tmp_path / "gallery.html").all("a")] == ["./caf%E9.png"]
