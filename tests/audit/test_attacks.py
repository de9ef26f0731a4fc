"""Files made to do harm: nothing in them is run, nothing outside of the source is read, nothing they say is markup."""

import io
import json
import os
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from bad_inputs import parquet, plain
from PIL import Image

from ptglab import data
from ptglab.errors import InputError
from ptglab.lab import notebooks, runs
from ptglab.train import backbones, checkpoints

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


class Attack:
    """What leaves a file `marker` in the current folder when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks() -> dict[str, object]:
    return {
        "system": Attack(os.system, "touch marker"),
        "exec": Attack(exec, "open('marker', 'w')"),
        "open": Attack(open, "marker", "w"),
        "getattr": Attack(getattr, Attack(open, "marker", "w"), "close"),
        "array": np.array([Attack(open, "marker", "w")], object),
    }


def torch_zip(content: bytes) -> bytes:
    """Return a file of torch's own kind around the pickle `content`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", part)
    return buffer.getvalue()


def npy(content: bytes) -> bytes:
    """Return an array file that says it holds Python objects, which are `content`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return buffer.getvalue() + content


WRAPS = {"pickle": lambda attack: pickle.dumps({"worse_label": attack, "clean_label": attack}, 2),
         "protocol 5": lambda attack: pickle.dumps(attack, 5),
         "torch": lambda attack: torch_zip(pickle.dumps({"conv1.weight": attack}, 2)),
         "npy": lambda attack: npy(pickle.dumps(attack))}  # fmt: skip


def read_array(path: Path):
    runs.Run(path.parents[1]).array(path.stem)


def grow_array(path: Path):
    runs.Run(path.parents[1]).growing_array(path.stem, (1,))


def load_checkpoint(path: Path):
    """A damaged one is put aside, and training begins anew."""
    network = torch.nn.Linear(1, 1)
    if not checkpoints.load(path, torch.optim.SGD(network.parameters(), lr=1), network=network):
        raise InputError("nothing was loaded")


READERS = {
    "CIFAR-N": data.read_cifar_n,
    "ImageNet": lambda path: backbones._imagenet_weights("resnet18", path),
    "weights": backbones.load,
    "checkpoint": load_checkpoint,
    "array": read_array,
    "growing": grow_array,
}


@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_is_run(tmp_path, monkeypatch, reader):
    """Whatever is put in the place of a file we read, of whatever suffix; and unpickled, each would have run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrays").mkdir()
    for suffix in (".npy", ".pt", ".pth", ".safetensors"):
        for attack in attacks().values():
            for wrap in WRAPS.values():
                path = tmp_path / "arrays" / f"x{suffix}"
                path.write_bytes(wrap(attack))
                # An archive in the place of an array is opened, and none of it read.
                with pytest.raises((InputError, ValueError)) if reader != "array" else suppress(InputError, ValueError):
                    READERS[reader](path)
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]
    pickle.loads(pickle.dumps(attacks()["open"])).close()
    assert (tmp_path / "marker").exists()


def test_an_array_that_is_only_announced_is_not_made(tmp_path):
    """A file of a hundred bytes that asks for a terabyte."""
    labels = np.zeros(4, np.int64)
    reduce = labels.__reduce__()
    file = io.BytesIO()
    huge = Attack(reduce[0], np.ndarray, (10**11,), b"b")
    torch.save({"worse_label": huge, "clean_label": labels}, file)
    (tmp_path / "x.pt").write_bytes(file.getvalue())
    with pytest.raises(InputError, match="no CIFAR-N label file"):
        data.read_cifar_n(tmp_path / "x.pt")
    torch.save({"worse_label": labels, "clean_label": labels}, tmp_path / "x.pt")
    assert data.read_cifar_n(tmp_path / "x.pt").keys() == {"label_worse", "label"}


# ---- nothing outside of the source is read

OUTSIDE = ["../outside.png", "{}/outside.png", "a/../../outside.png", "..\\outside.png", "./../outside.png",
           "file://{}/outside.png", "~/outside.png", "a.png\0/../../outside.png", "a\n../outside.png", "link.png",
           "folder/outside.png", "%2e%2e/outside.png", "..%2foutside.png", "/proc/self/environ"]  # fmt: skip


@pytest.fixture
def inside(tmp_path) -> Path:
    """A folder with two images, and links to an image and a folder outside of it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.png").write_bytes(plain("outside.png"))
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(plain(name))
    (tmp_path / "in" / "link.png").symlink_to("../outside.png")
    (tmp_path / "in" / "folder").symlink_to("..")
    return tmp_path / "in"


@pytest.mark.parametrize("path", OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_csv_cannot_name_what_is_outside(inside, path):
    path = path.format(inside.parent)
    text = f'id,label\na.png,x\nb.png,y\n"{path}",z\n'
    (inside / "labels.csv").write_text(text, newline="")
    if "\0" in path:
        with pytest.raises(InputError, match="NUL"):
            data.load(inside)
        return
    image_set = data.load(inside)
    assert image_set.ids == ["a.png", "b.png"] and image_set.class_names == ["x", "y"]
    assert len(image_set.unreadable) >= 2


@pytest.mark.parametrize("path", OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_list_cannot_name_what_is_outside(inside, path):
    (inside / "info").mkdir()
    (inside / "info" / "synsets.txt").write_text("n1 a\nn2 b\n")
    (inside / "info" / "train_filelist_flickr.txt").write_text("")
    (inside / "google").mkdir()
    for name in ("a.png", "b.png"):
        (inside / name).rename(inside / "google" / name)
    (inside / "link.png").rename(inside / "google" / "link.png")
    lines = f"google/a.png 0\ngoogle/b.png 1\n{path.format(inside.parent)} 0\ngoogle/{path.format(inside.parent)} 0\n"
    (inside / "info" / "train_filelist_google.txt").write_text(lines, newline="")
    try:
        image_set = data.load(inside, labels="google")
    except InputError as error:
        assert "\n" not in str(error) and "train_filelist_google.txt" in str(error)
        return
    assert image_set.ids == ["google/a.png", "google/b.png"]


def test_a_parquet_file_cannot_name_files(inside):
    """Only its bytes count: a path beside them, and a path in their place, is not opened."""
    image = [{"bytes": plain("a.png"), "path": "../outside.png"}, {"bytes": None, "path": str(inside / "a.png")}]
    (inside / "x.parquet").write_bytes(parquet(image=pa.array(image), label=[0, 1]))
    image_set = data.load(inside / "x.parquet")
    assert len(image_set) == 1 and image_set.unreadable == [("1", "not an image: it is empty")]


# ---- what data say is never markup


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_make_no_markup_of_their_own(path):
    """Tables are pandas', which escape; there is no markup written by hand into which a name could go."""
    cells = json.loads(path.read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    bad = (
        r"\b(HTML|Markdown|Latex|Math|Javascript|SVG)\b|_repr_(html|markdown|latex|javascript)_|\.style\.|escape=False"
    )
    assert not re.search(bad, source)


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "$x^2$ \\(y\\)", "[a](javascript:alert(1))"]


@pytest.mark.slow
def test_an_executed_audit_escapes_names(tmp_path, monkeypatch):
    """Classes and files that are called as markup is, through notebook 6 in a kernel: no output takes them for it."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for k, name in enumerate(HOSTILE):
        folder = tmp_path / "in" / name.replace("/", "\u2215")
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = draws.integers(60 * k, 60 * k + 60, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i} <b onclick=alert(1)>{name[:3]}.png".replace("/", "\u2215"))
    (tmp_path / "in" / HOSTILE[1] / "bad <svg onload=alert(1)>.png").write_bytes(b"no image")
    given = notebooks.values("06_audit_your_images", ["dataset=in", "run_dir=out", "device=cpu", "start=scratch"])
    notebooks.execute("06_audit_your_images", tmp_path / "out" / "report.ipynb", given)
    cells = json.loads((tmp_path / "out" / "report.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds <= {"text/plain", "text/html", "image/png"} and "text/html" in kinds
    pages = ["".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})]
    pages.append((tmp_path / "out" / "gallery.html").read_text(encoding="utf-8"))
    for page in pages:
        assert not re.search(r"<script>alert|<img src=x|<b onclick|<svg onload", page)
    assert "&lt;img src=x onerror=alert(1)&gt;" in pages[-1]
