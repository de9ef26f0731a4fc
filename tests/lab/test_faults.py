"""Faults, each made to happen: one line says what it is and what to do, and what was whole stays whole."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from expected import refused
from PIL import Image
from tiny_notebooks import gone, until, write_notebook
from torch import nn

from ptglab import data, files
from ptglab.data import decode
from ptglab.lab import runs
from ptglab.train import backbones, checkpoints, engine, finetune, pretrain

FULL = "the disk is full; make room and run again, it goes on where it was"


@pytest.fixture
def run(tmp_path):
    run = runs.start(tmp_path / "run", seed=0)
    run.save_results([{"seed": 1}])
    run.save_array("probs", np.ones(3))
    return run


@pytest.fixture
def full_disk(monkeypatch):
    """Return a function after which the system has no room for anything that is flushed, or allocated."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(os, "posix_fallocate", full)

    return fill


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- the disk


@pytest.mark.parametrize("how", ["full disk", "file size limit"])
def test_what_does_not_fit_is_refused_and_what_was_there_stays(how, run, few, full_disk):
    """The system sends SIGXFSZ at the limit of a file's size, which Python ignores, and refuses to write."""
    resource, line = pytest.importorskip("resource"), f"cannot write {run.path}"
    backbones.save(run.weights, backbones.build("resnet18", 2, few.images, 0))
    before, limit = run.weights.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "full disk":
        full_disk()
        refused(f"{line}: {FULL}", call=run.save_results)([{"seed": 2}])
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        refused(line, call=run.save_array)("features", np.ones(100_000))
        refused(line, call=run.growing_array)("history", (1000, 1000))
        refused(line, call=backbones.save)(run.weights, backbones.build("resnet18", 4, few.images, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert run.results()["seed"].tolist() == [1] and run.weights.read_bytes() == before
    assert names(run.path / "arrays") == {"probs.npy"} and not list(run.path.rglob("*.tmp"))


def steps(run, epochs, few, seed=0):
    network = backbones.build("resnet18", 2, few.images, seed)
    records = pretrain.train(
        network, few.images[:32], "simclr", epochs=epochs, batch_size=32, projection=8, place=engine.place("cpu"),
        checkpoint=run.checkpoint,
    )  # fmt: skip
    run.follow(records, "pre-train", epochs)
    return network.state_dict()


def test_checkpoint(run, few, full_disk, monkeypatch, tmp_path):
    """In the third of four epochs; with room again, the run ends as one that never was disturbed."""
    replace, count = os.replace, []

    def third_is_full(source, target):
        count.append(str(target) == str(run.checkpoint))
        if sum(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", third_is_full)
        refused(f"cannot write {run.path}: {FULL}", call=steps)(run, 4, few)
    assert "checkpoint.previous.safetensors" in names(run.path) and len(run.records()) == 3
    resumed, whole = steps(run, 4, few, seed=5), steps(runs.start(tmp_path / "whole"), 4, few)
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_record(run, full_disk):
    def records():
        yield {"epoch": 1}
        full_disk()
        yield {"epoch": 2}

    refused(f"cannot write {run.path}: {FULL}", call=run.follow)(records(), "pre-train", 2)
    assert run.records()["epoch"].tolist()[:1] == [1]


def test_a_disk_that_is_really_full(tmp_path, few):
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here")
    try:
        run = runs.start(disk / "run", seed=0)
        run.save_array("probs", np.ones(1000))
        line = "the disk is full"
        refused(line, call=run.save_array)("features", np.ones(1_000_000))
        refused(line, call=run.growing_array)("history", (1000, 1000))
        refused(line, call=backbones.save)(run.weights, backbones.build("resnet18", 16, few.images, 0))
        assert names(run.path / "arrays") == {"probs.npy"} and run.array("probs").sum() == 1000
        assert not run.weights.exists()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_read_only(run, monkeypatch):
    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    line = "it can only be read; give a folder that can be written"
    monkeypatch.setattr(os, "replace", read_only)
    refused(f"cannot write {run.path}: {line}", call=run.save_results)([{"seed": 2}])
    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(f"cannot write {run.path}: {line}", call=runs.start)(run.path, seed=0)
    refused(f"cannot write {run.path / 'stage'}: {line}", call=run.stage)("stage")
    assert run.results()["seed"].tolist() == [1]


def test_a_file_in_the_way(run, tmp_path):
    (run.path / "stage").write_text("")
    refused(f"cannot write {run.path / 'stage'}: a file stands where a folder should", call=run.stage)("stage")
    (tmp_path / "file").write_text("")
    refused(f"cannot write {tmp_path / 'file'}: a file stands", call=runs.start)(tmp_path / "file")


# ---- damaged files


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[-len(content) // 3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "both", "said"),
    [
        ("cut", False, "going on from the one before it, after epoch 1"),
        ("bit", False, "going on from the one before it, after epoch 1"),
        ("bit", True, "this stage starts anew"),
    ],
)
def test_checkpoints(how, both, said, run, few, tmp_path, capsys):
    whole = steps(runs.start(tmp_path / "whole"), 3, few)

    def stopped():
        network = backbones.build("resnet18", 2, few.images, 0)
        options = dict(epochs=3, batch_size=32, projection=8, place=engine.place("cpu"), checkpoint=run.checkpoint)
        for record in pretrain.train(network, few.images[:32], "simclr", **options):
            if record["epoch"] == 3:
                return
            yield record

    run.follow(stopped(), "pre-train", 3)
    damage(run.checkpoint, how)
    if both:
        damage(checkpoints.previous(run.checkpoint), how)
    capsys.readouterr()
    resumed = steps(run, 3, few)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "damaged" in line]
    assert len(lines) == 1 and str(run.checkpoint) in lines[0] and lines[0].endswith(said)
    assert all(torch.equal(resumed[k], whole[k]) for k in whole) and run.records()["epoch"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("content", [b'{"seed": ', b"\xff\xfe", b"", b"[1]"])
def test_params(run, content):
    (run.path / "params.json").write_bytes(content)
    line = f"{run.path / 'params.json'} is damaged: delete {run.path} and run again"
    refused(line, call=runs.start)(run.path, seed=0)
    assert (run.path / "params.json").read_bytes() == content and run.results()["seed"].tolist() == [1]


@pytest.mark.parametrize("line", [b"\0\0\0", b"\xff", b'{"loss": 1}', b"7", b'{"epoch": "x"}', b'{"epo'])
def test_records(run, line):
    path = run.path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + line + b'\n{"epoch": 3}\n')
    said = f"line 2 of {path} is damaged: delete {run.path} and run again"
    refused(said, call=run.records)()
    refused(said, call=run.follow)([{"epoch": 4}], "pre-train", 4)


@pytest.mark.parametrize(
    "content",
    [lambda whole: whole[:-5], lambda whole: whole[:20], lambda whole: b"", lambda w: w[:12] + b"?" * 60 + w[72:]],
    ids=["cut", "header cut", "empty", "header garbled"],
)
def test_arrays(content, run):
    path = run.path / "arrays" / "features.npy"
    run.save_array("features", np.ones((4, 4), np.float32))
    path.write_bytes(content(path.read_bytes()))
    line = f"{path} is damaged: delete {run.path} and run again"
    refused(line, call=run.array)("features")
    refused(line, call=run.growing_array)("features", (4, 4))
    assert run.array("probs").sum() == 3


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_damaged_weights(how, run, few):
    backbones.save(run.weights, backbones.build("resnet18", 2, few.images, 0))
    damage(run.weights, how)
    line = f"if it did, it is damaged: delete {run.path} and run again"
    refused(f"{run.weights} holds no network of ours", line, call=backbones.load)(run.weights)


# ---- the machine


def test_the_clock_is_set(run, few, tmp_path, monkeypatch):
    whole = steps(runs.start(tmp_path / "whole"), 3, few)
    jumps = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 3e7)
    jumped = steps(run, 3, few)
    assert all(torch.equal(jumped[k], whole[k]) for k in whole)
    assert (run.records()["seconds"] > 0).all() and (run.records()["seconds"] < 1000).all()


# A cell that records epochs until it is stopped, and says that it does.
NOTEBOOK = """
import os, time
from ptglab.lab import runs
run = runs.start(run_dir)
def steps():
    for epoch in range(1, 1_000_000):
        yield {"epoch": epoch}
        (run.path / "pid").write_text(str(os.getpid()))
        time.sleep(0.05)
run.follow(steps(), "train", 10_000)
"""


@pytest.fixture
def long(tmp_path):
    """The command that executes such a notebook in `tmp_path`/run, and the process of its kernel, which is at work."""
    write_notebook(tmp_path / "long.ipynb", 'run_dir = "run"  # where', NOTEBOOK)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "ptglab", "run", "long.ipynb", "out/nb.ipynb", "-p", f"run_dir={run}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **options) as process:
        kernel = int(until(lambda: (run / "pid").exists() and (run / "pid").read_text()))
        yield process, kernel
        process.kill()


def test_two_processes(tmp_path, monkeypatch, long):
    process, kernel = long
    monkeypatch.setattr(files, "PATIENCE", 0)
    line = f"another process is at work in {tmp_path / 'run'}: process {kernel} on "
    refused(line, ", since ", call=runs.start)(tmp_path / "run")
    assert runs.Run(tmp_path / "run").params == {}  # who only reads needs no lock
    os.kill(kernel, signal.SIGKILL)
    process.wait()
    for _ in range(2):  # the dead one's lock is free; a notebook may be executed twice in one kernel
        assert runs.start(tmp_path / "run").params == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what becomes of kernels is told from /proc")
@pytest.mark.parametrize(
    ("victim", "number", "status", "said"),
    [
        ("kernel", signal.SIGKILL, 2, "ptglab: the kernel of long.ipynb died in cell 3: "),
        ("command", signal.SIGTERM, 130, "ptglab: stopped; "),
        pytest.param("command", signal.SIGINT, 130, "ptglab: stopped; ", marks=pytest.mark.slow),
        pytest.param("kernel", signal.SIGTERM, 130, "ptglab: stopped; ", marks=pytest.mark.slow),
    ],
)
def test_while_a_cell_runs(victim, number, status, said, tmp_path, long):
    """One line, its status, no kernel left, no copy half-executed; what was recorded is whole."""
    process, kernel = long
    os.kill(kernel if victim == "kernel" else process.pid, number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    lines = [line for line in err.splitlines() if line.startswith("ptglab:")]
    assert len(lines) == 1 and lines[0].startswith(said)
    assert "Traceback" not in err, err
    until(lambda: gone(kernel))
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") <= {"failed-nb.ipynb"}
    run = runs.Run(tmp_path / "run")
    epochs = run.records()["epoch"].tolist()
    assert epochs == list(range(1, len(epochs) + 1)) and epochs
    runs.start(run.path, run_dir=str(run.path))  # its lock is free


# ---- memory


class Small(nn.Module):
    """A backbone on a device whose memory holds `most` rows."""

    def __init__(self, inner: nn.Module, most: int):
        super().__init__()
        self.inner, self.most, self.num_features = inner, most, inner.num_features

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(x)


def test_pretraining(run, few):
    network = Small(backbones.build("resnet18", 2, few.images, 0), 40)  # both views: 20 images
    records = pretrain.train(
        network, few.images, "simclr", epochs=2, batch_size=128, projection=8, place=engine.place("cpu"),
        checkpoint=run.checkpoint,
    )  # fmt: skip
    line = "the GPU's memory is too small for a batch of 128, and batch norm must see it whole: batch_size=16 fits"
    refused(line, call=list)(records)
    assert not run.checkpoint.exists()


@pytest.mark.parametrize(("most", "mend"), [(20, "batch_size=16 fits"), (1, "not even two rows fit")])
def test_fine_tuning(most, mend, few):
    network = Small(backbones.build("resnet18", 2, few.images, 0), most)
    head = backbones.head(network.num_features, 10)
    records = finetune.train(
        network, head, few.images, few.labels_given, mode="full", epochs=1, batch_size=64, place=engine.place("cpu")
    )
    refused("too small for a batch of 64", mend, call=list)(records)


def test_a_frozen_backbone(few):
    """The records and the head are those of a device that holds everything, up to rounding."""
    records, heads = [], []
    for most in (1000, 7):
        network = Small(backbones.build("resnet18", 2, few.images, 0), most)
        head = backbones.head(network.num_features, 10)
        steps = finetune.train(network, head, few.images, few.labels_given, mode="linear", epochs=2, batch_size=64,
                               place=engine.place("cpu"), test=(few.images[:50], few.labels_given[:50]))  # fmt: skip
        records.append([{k: v for k, v in record.items() if k != "seconds"} for record in steps])
        heads.append(head[1].weight.detach())
    for whole, parts in zip(*records, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-4, atol=1e-6)


def test_images_larger_than_memory(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(tmp_path / "photos" / name)
    monkeypatch.setattr(decode, "free_memory", lambda: 100.0)
    mapped = data.load(tmp_path / "photos").images  # in the cache, then
    assert mapped.shape == (3, 3, 8, 8) and (mapped == 7).all()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "allocate", full)
    line = "3 images of 0.0 GB do not fit into "
    refused(line, "give a smaller image_size, or set PTGLAB_CACHE", call=data.load)(tmp_path / "photos", at_most=4)
