"""Files made to do harm: nothing in them is run, nothing outside of the source is read, nothing they say is markup."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from bad_inputs import parquet, plain
from PIL import Image
from tiny_notebooks import write_notebook

from ptglab import audit, data
from ptglab.audit import stages
from ptglab.errors import InputError
from ptglab.lab import notebooks, runs, spec, sweeps
from ptglab.train import backbones, checkpoints, patches


class Attack:
    """An object that calls a function when it is unpickled; those below leave a file `marker` in the current folder."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = [Attack(os.system, "touch marker"), Attack(exec, "open('marker', 'w')"), Attack(open, "marker", "w"),
           Attack(getattr, Attack(open, "marker", "w"), "close"),
           np.array([Attack(open, "marker", "w")], object)]  # fmt: skip


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


WRAPS = [
    lambda attack: pickle.dumps({"worse_label": attack, "clean_label": attack}, 2),
    lambda attack: pickle.dumps(attack, 5),
    lambda attack: torch_zip(pickle.dumps({"conv1.weight": attack}, 2)),
    lambda attack: npy(pickle.dumps(attack)),
]


def load_checkpoint(path: Path):
    """A damaged one is put aside, and training begins anew."""
    network = torch.nn.Linear(1, 1)
    if not checkpoints.load(path, torch.optim.SGD(network.parameters(), lr=1), network=network):
        raise InputError("nothing was loaded")


READERS = {
    "CIFAR-N": (".pt", data.read_cifar_n),
    "ImageNet": (".pth", lambda path: backbones.imagenet("resnet18", torch.zeros(1, 3, 4, 4).byte(), path)),
    "safetensors": (".safetensors", lambda path: backbones.imagenet("resnet18", torch.zeros(1, 3, 4, 4).byte(), path)),
    "weights": (".safetensors", backbones.load),
    "patches": (".safetensors", patches.load),
    "checkpoint": (".safetensors", load_checkpoint),
    "array": (".npy", lambda path: runs.Run(path.parents[1]).array(path.stem)),
    "growing": (".npy", lambda path: runs.Run(path.parents[1]).growing_array(path.stem, (1,))),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_is_run(tmp_path, monkeypatch, reader):
    """Whatever is put in the place of a file we read; and unpickled, each would have run."""
    monkeypatch.chdir(tmp_path)
    suffix, read = READERS[reader]
    (path := tmp_path / "arrays" / f"x{suffix}").parent.mkdir()
    for attack in ATTACKS:
        for wrap in WRAPS:
            path.write_bytes(wrap(attack))
            # An archive in the place of an array is opened, and none of it read.
            with pytest.raises((InputError, ValueError)) if reader != "array" else suppress(InputError, ValueError):
                read(path)
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]
    pickle.loads(pickle.dumps(ATTACKS[2])).close()
    assert (tmp_path / "marker").exists()


def test_an_array_that_is_only_announced_is_not_made(tmp_path):
    """A file of a hundred bytes that asks for a terabyte."""
    labels = np.zeros(4, np.int64)
    huge = Attack(labels.__reduce__()[0], np.ndarray, (10**11,), b"b")
    torch.save({"worse_label": huge, "clean_label": labels}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no CIFAR-N label file"):
        data.read_cifar_n(tmp_path / "x.pt")


OUTSIDE = ["../outside.png", "{}/outside.png", "a/../../outside.png", "..\\outside.png", "./../outside.png",
           "file://{}/outside.png", "~/outside.png", "a\n../outside.png", "link.png", "folder/outside.png",
           "%2e%2e/outside.png", "..%2foutside.png", "/proc/self/environ"]  # fmt: skip


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


def test_a_csv_cannot_name_what_is_outside(inside):
    for path in (path.format(inside.parent) for path in OUTSIDE):
        (inside / "labels.csv").write_text(f'id,label\na.png,x\nb.png,y\n"{path}",z\n', newline="")
        image_set = data.load(inside)
        assert image_set.ids == ["a.png", "b.png"] and image_set.class_names == ["x", "y"], path
        assert len(image_set.unreadable) >= 2


def test_a_parquet_file_cannot_name_files(inside):
    """Of a source that is one file only bytes count: a path beside them, and one in their place, is not opened."""
    image = [{"bytes": plain("a.png"), "path": "../outside.png"}, {"bytes": None, "path": str(inside / "a.png")}]
    (inside / "x.parquet").write_bytes(parquet(image=pa.array(image), label=[0, 1]))
    image_set = data.load(inside / "x.parquet")
    assert image_set.ids == ["../outside.png"]  # which is what it is called, no more
    assert image_set.unreadable == [(str(inside / "a.png"), "not an image: it is empty")]


def test_a_parquet_file_names_files_of_its_folder_only(inside):
    names = ["../outside.png", str(inside.parent / "outside.png"), "link.png", "folder/outside.png", "b.png", "a\0"]
    (inside / "in").mkdir()
    for name in ("a.png", "b.png", "link.png", "folder"):
        (inside / name).rename(inside / "in" / name)
    (inside / "in" / "link.png").unlink()
    (inside / "in" / "link.png").symlink_to(inside.parent / "outside.png")
    image = [{"bytes": plain("a.png"), "path": "x"}, *({"bytes": None, "path": name} for name in names)]
    (inside / "in" / "train.parquet").write_bytes(parquet(image=pa.array(image), label=[0, *[1] * 6]))
    assert data.load(inside / "in").ids == ["x", "b.png"]


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "$x^2$ \\(y\\)", "[a](javascript:alert(1))"]
RUN = re.compile(r"<script>alert|<img src=x|<b onclick|<svg onload")


@pytest.fixture
def hostile(tmp_path) -> Path:
    """Classes and files that are called as markup is."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(HOSTILE):
        folder = tmp_path / "in" / name.replace("/", "\u2215")
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(60 * k, 60 * k + 60, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i} <b onclick=alert(1)>{name[:3]}.png".replace("/", "\u2215"))
    (tmp_path / "in" / HOSTILE[1] / "bad <svg onload=alert(1)>.png").write_bytes(b"no image")
    return tmp_path / "in"


def test_an_audit_escapes_names(hostile, tmp_path):
    audit.run(hostile, tmp_path / "out", device="cpu", start="patches")
    page = (tmp_path / "out" / "gallery.html").read_text(encoding="utf-8")
    assert not RUN.search(page) and "&lt;img src=x onerror=alert(1)&gt;" in page


@pytest.mark.slow
def test_an_executed_audit_escapes_names(hostile, tmp_path):
    """Through notebook 6 in a kernel: no output takes them for markup."""
    given = notebooks.values(
        stages.NOTEBOOK, [f"dataset={hostile}", f"run_dir={tmp_path}/out", "device=cpu", "start=patches"]
    )
    notebooks.execute(stages.NOTEBOOK, tmp_path / "out" / "report.ipynb", given)
    cells = json.loads((tmp_path / "out" / "report.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output}
    assert kinds <= {"text/plain", "text/html", "image/png"} and "text/html" in kinds
    assert not any(RUN.search("".join(output.get("text/html", ""))) for output in outputs)


# ---- modules beside the images

PLANTED = ("umap", "seaborn", "ipykernel_launcher", "ipykernel", "ctypes", "json", "pathlib", "joblib", "sitecustomize",
           "ipython_config", "ipython_kernel_config", "jupyter_config")  # fmt: skip


@pytest.fixture
def planted(tmp_path) -> Path:
    """A folder of images in which there are modules too, and start-up files; each leaves a mark when it is run."""
    (folder := tmp_path / "photos").mkdir()
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write(__file__ + '\\n')\n"
    for name in PLANTED:
        (folder / f"{name}.py").write_text(mark)
    (startup := folder / "profile_default" / "startup").mkdir(parents=True)
    (startup / "00.py").write_text(mark)
    return folder


def python(*words: str, cwd: Path) -> str:
    """Run Python without a path of its own in `cwd`, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=kept, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    return done.stdout


def test_no_module_beside_the_images_is_run(planted, tmp_path):
    """Neither by the command, nor in its kernel, nor in a process that the kernel starts."""
    body = (
        "import json, subprocess, sys, seaborn\nprint(subprocess.check_output([sys.executable, '-c', 'import ctypes']))"
    )
    notebook = write_notebook(tmp_path / "mine.ipynb", "seed = 0  # any\n", body)
    for number, entry in enumerate((["-m", "ptglab"], [str(Path(sys.executable).with_name("ptglab"))])):
        python(*entry, "run", notebook, str(tmp_path / f"{number}.ipynb"), cwd=planted)
    assert not (tmp_path / "ran").exists()


def test_no_module_beside_the_images_is_run_by_a_process_that_decodes(planted, tmp_path):
    """joblib starts it with `-m`, which puts the working folder first."""
    (script := tmp_path / "script.py").write_text(
        "from ptglab.data import cache\nimport torch\ntorch.set_num_threads(2)\nif __name__ == '__main__':\n"
        "    blocks = cache.blocks(['a', 'b'])[:1] * 2\n"
        "    print(len(cache._in_parallel(cache._headers, blocks, [()] * 2, 't', True)))\n"
    )
    assert python(str(script), cwd=planted).strip() == "4" and not (tmp_path / "ran").exists()


def test_no_module_in_the_folder_of_a_cell_is_run(planted, tmp_path):
    notebook = write_notebook(tmp_path / "mine.ipynb", 'run_dir = "r"  # where\n', "import seaborn")
    [cell] = spec.plan(spec.Spec(title="t", grids=[spec.Part(notebook=notebook)]))
    shutil.copytree(planted, tmp_path / "out" / cell.name)
    assert [event.state for event in sweeps.run([cell], tmp_path / "out")] == ["started", "finished"]
    assert not (tmp_path / "ran").exists()


def test_a_users_own_kernel_is_not_used_and_that_is_said(tmp_path, monkeypatch, capfd):
    kernel = {
        "argv": [str(tmp_path / "python"), "-f", "{connection_file}"],
        "display_name": "mine",
        "language": "python",
    }
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    access, home = os.access, os.path.expanduser("~")  # which cannot be written either
    monkeypatch.setattr(os, "access", lambda path, *mode: path != home and access(path, *mode))
    names = ("MPLCONFIGDIR", "NUMBA_CACHE_DIR", "IPYTHONDIR")
    body = f"import os, sys\nprint(sys.executable, *(os.path.isdir(os.environ[n]) for n in {names}))"
    notebook = write_notebook(tmp_path / "mine.ipynb", "seed = 0  # any\n", body)
    notebooks.execute(notebook, tmp_path / "out.ipynb", {})
    said = capfd.readouterr()
    assert f"{sys.executable} True True True" in said.out and f"python3 in {tmp_path / 'kernels'}" in said.err


@pytest.mark.slow
def test_no_module_beside_audited_images_is_run(planted, tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (planted / name).mkdir()
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(planted / name / f"{i}.png")
    entry = str(Path(sys.executable).with_name("ptglab"))
    python(entry, "audit", ".", "--out", str(tmp_path / "out"), "--start", "scratch", "--device", "cpu", cwd=planted)
    assert (tmp_path / "out" / "suspects.csv").exists() and not (tmp_path / "ran").exists()
