"""Whatever the bytes: loaded or refused in a line; nothing half written, nothing written elsewhere or from outside.

A thousand damaged sources go through loading and everything an audit writes (`make soak`), a hundred in every run.
"""

import io
import os
import shutil
from collections import Counter
from pathlib import Path

import fuzz
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ptglab import data, files
from ptglab.audit import exports
from ptglab.data import cache
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError
from ptglab.text import printable

WRITTEN = {"suspects.csv", "unreadable.csv", "gallery.html", "label_studio.json", "label_studio.xml", "fiftyone.csv",
           "summary.json"}  # fmt: skip
quick = settings(database=None, deadline=None, derandomize=True, max_examples=60,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip


def tree(folder: Path) -> dict[str, tuple]:
    """Return what is below `folder`, links not followed: {path: (kind, size, time of change)}."""
    found = {}
    for inside, names, leaves in os.walk(folder):
        for name in (*names, *leaves):
            path = os.path.join(inside, name)
            status = os.lstat(path)
            found[path] = (status.st_mode, *(() if os.path.isdir(path) else (status.st_size, status.st_mtime_ns)))
    return found


def one_line(text: str) -> bool:
    return len(text.splitlines()) == 1 and text == printable(text)


def go_through(number: int, base: Path) -> tuple[str, str]:
    """Build the source of that number, load it, write all an audit writes; return (kind, what came of it)."""
    for name in ("source", "run", "here"):
        (base / name).mkdir()
    Image.new("RGB", (8, 8)).save(base / "outside.png")
    source, labels, kind = fuzz.build(number, base / "source")
    before, back = tree(base), os.getcwd()
    os.chdir(base / "here")
    try:
        image_set = data.load(source, labels=labels, at_most=32)
    except InputError as error:
        assert one_line(str(error)), ascii(str(error))
        assert tree(base) == before
        return kind, "refused"
    else:
        n, k = len(image_set), image_set.num_classes
        home = os.path.join(os.path.realpath(source), "")
        assert all(os.path.realpath(file).startswith(home) for file in image_set.files)
        texts = [*image_set.ids, *image_set.class_names, *(text for pair in image_set.unreadable for text in pair)]
        assert all(one_line(text) for text in texts if text)
        assert n == len(image_set.labels_given) and set(image_set.labels_given) <= set(range(k))
        rng = np.random.default_rng(number)
        suspects = Suspects(rng.random(n, np.float32), rng.random(n) < 0.5, rng.integers(0, k, n))
        summary = {"detector": "knn", "unknown": "Nothing.", "flagged": 1, "images": n}
        exports.unreadable(base / "run", image_set)
        exports.write(base / "run", image_set, suspects, summary, source)
        after = tree(base)
        assert {path: after[path] for path in before if path in after} == before  # nothing was changed or taken away
        new = {os.path.relpath(path, base / "run") for path in after.keys() - before.keys()}
        pictures = {name for name in new if name.startswith("images")}
        assert new - pictures == WRITTEN and not [name for name in new if name.endswith(".tmp")]
        page = (base / "run" / "gallery.html").read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>") and page.count("<script") == 1
        return kind, "audited"
    finally:
        os.chdir(back)


def all_of(numbers: range, folder: Path) -> Counter:
    counts = Counter()
    for number in numbers:
        base = folder / str(number)
        base.mkdir()
        counts[go_through(number, base)] += 1
        shutil.rmtree(base)
    assert list(folder.iterdir()) == []
    return counts


@pytest.mark.parametrize("numbers", [range(98), pytest.param(range(1000, 2001), marks=pytest.mark.soak)])
def test_damaged_sources(tmp_path, capfd, numbers):
    counts = all_of(numbers, tmp_path)
    assert counts.total() == len(numbers) and {kind for kind, _ in counts} == set(fuzz.KINDS)
    assert sum(n for (_, fate), n in counts.items() if fate == "audited") > len(numbers) // 4
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("numbers", [range(100), pytest.param(range(1000, 6000), marks=pytest.mark.soak)])
def test_damaged_images_are_read_or_listed(tmp_path, numbers):
    """A damaged image a number, beside a good one."""
    blobs = [fuzz.image(np.random.default_rng(0), share=0)[1]]
    blobs += [fuzz.image(np.random.default_rng([7, number]), share=1)[1] for number in numbers]
    ids, parts = [str(i) for i in range(len(blobs))], [cache.Block(len(blobs), lambda: map(io.BytesIO, blobs))]
    images, originals, unreadable, _ = cache.images(parts, ids, [], tmp_path, 16)
    kept = originals.rows.tolist()
    assert kept[0] == 0 and sorted([*kept, *(int(id) for id, _ in unreadable)]) == list(range(len(blobs)))
    assert images.shape[0] == len(kept) and all(one_line(reason) for _, reason in unreadable)
    assert min(len(kept), len(unreadable)) > 10


# ---- any bytes as CSV, any text as label


@pytest.fixture
def flat(tmp_path) -> Path:
    """Three images without labels, in a folder of their own."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


def load_or_refuse(folder: Path, content: bytes, labels: str | None = None) -> data.ImageSet | None:
    (folder / "labels.csv").write_bytes(content)
    before = tree(folder.parent)
    try:
        return data.load(folder, labels=labels)
    except InputError as error:
        assert one_line(str(error)), ascii(str(error))
        return None
    finally:
        assert tree(folder.parent) == before


PIECES = st.sampled_from([b"id", b"label", b",", b"\n", b"0.png", b"1.png", b'"', b";", b"\r", b"\0", b"\xff", b" "])


@quick
@given(content=st.binary(max_size=200) | st.lists(PIECES, max_size=60).map(b"".join))
def test_any_bytes_are_a_csv_or_refused(flat, content):
    image_set = load_or_refuse(flat, content)
    assert image_set is None or set(image_set.ids) <= {"0.png", "1.png", "2.png"}


@quick
@given(texts=st.lists(st.text(max_size=30), min_size=3, max_size=3), column=st.text(max_size=10))
def test_any_text_is_a_label_and_comes_back(flat, texts, column):
    """Through a table of ours: a text is a class, as printed; an empty one leaves its image out."""
    load_or_refuse(flat, b"id,label\n0.png,a\n", column)
    files.write_csv(flat.parent / "t.csv", pd.DataFrame({"id": [f"{i}.png" for i in range(3)], "label": texts}))
    image_set = load_or_refuse(flat, (flat.parent / "t.csv").read_bytes())
    shown = [printable(text.strip()) for text in texts]
    if image_set is None:
        assert not any(shown) or any("\0" in text for text in texts)
        return
    named = dict(zip(image_set.ids, (image_set.class_names[i] for i in image_set.labels_given), strict=True))
    whole = all(text.replace(".", "", 1).isdecimal() for text in shown if text)  # 1.0 is 1 if all are such
    assert named == {f"{i}.png": text for i, text in enumerate(shown) if text} or whole


# ---- any text as parameter
