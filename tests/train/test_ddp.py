"""One network trained by two and by four processes: the same steps as alone; lost processes; torchrun."""

import os
import subprocess
import sys

import numpy as np
import pytest
import shared_jobs
import torch
from expected import refused
from shared_jobs import CPU

from ptglab.lab import runs
from ptglab.train import backbones, checkpoints, ddp, finetune, pretrain

NUMBERS = ["2", pytest.param("4", marks=pytest.mark.slow)]
PRETRAIN = {"epochs": 1, "batch_size": 30, "projection": 16, "augmentation": "digits", "seed": 3}
FINETUNE = {"epochs": 2, "batch_size": 32, "augmentation": "weak_digits", "validation": 0.25, "seed": 3}


@pytest.fixture(scope="module")
def some(digits):
    return digits.subset(94, seed=0)


@pytest.fixture(scope="module")
def trainings(some):
    """{number of processes: what `shared_jobs.trained` yields: three steps a method, then six and six}."""
    options, done = {"pretraining": PRETRAIN, "finetuning": FINETUNE, "width": 2, "place": CPU}, {}

    def run(number: str) -> list[dict]:
        if number not in done:
            done[number] = list(ddp.run(number, shared_jobs.trained, some.images, some.labels_given, **options))
        return done[number]

    return run


def close(many, one) -> None:
    """Assert that arrays are equal, relative to the largest entry of each; EMP-SSL rounds the most."""
    for a, b in zip(many, one, strict=True):
        assert np.abs(a - b).max() <= 1e-7 * max(np.abs(b).max(), 1e-9)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_step_is_that_of_one_process(trainings, number):
    """Losses, gradients, weights and running statistics of every method and of fine-tuning, in float64.

    30 and 7 rows are not 4 equal shards. In float32 roundings grow by themselves, beyond 1e-2.
    """
    many, one = trainings(number), trainings("1")
    assert len(many) == len(one) == len(pretrain.METHODS) + 2
    for i, (found, expected) in enumerate(zip(many, one, strict=True)):
        assert len(found["gradients"]) == len(expected["gradients"]) == (3 if i < len(pretrain.METHODS) else 6)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-11)
        for a, b in zip(found["gradients"], expected["gradients"], strict=True):
            close(a, b)
        close(found["weights"].values(), expected["weights"].values())
        assert found["same"]
        for a, b in zip(found["records"], expected["records"], strict=True):
            timed = {"seconds", "images_per_second"}
            expected_record = {k: v for k, v in b.items() if k not in timed}
            assert {k: v for k, v in a.items() if k not in timed} == pytest.approx(expected_record, rel=1e-6)
        if "history" in expected:
            np.testing.assert_allclose(found["history"], expected["history"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", NUMBERS)
def test_shards_come_back_in_order_with_their_own_gradients(number):
    """5 rows and 1 row: in order in every process; the gradient of a shard is that of its rows."""
    for found in ddp.run(number, shared_jobs.gathered, place=CPU):
        whole = torch.arange(2.0 * found["total"]).view(-1, 2)
        assert found["back"] == whole.tolist()
        sizes = [size for size, _ in found["parts"]]
        assert sum(sizes) == found["total"] and max(sizes) - min(sizes) <= 1 and len(sizes) == int(number)
        assert [row for _, rows in found["parts"] for row in rows] == (1 + whole).tolist()


def test_one_is_only_called():
    assert ddp.run("1", lambda *args, **kwargs: (args, kwargs), 1, x=2, place=CPU) == ((1,), {"x": 2, "place": CPU})
    shard, rows, network = ddp.Shard(), torch.arange(3), torch.nn.Linear(1, 1)
    assert shard.rows(3) == slice(0, 3) and shard.all_gather(rows, 3) is rows and shard.parallel(network) is network


def test_devices_are_counted(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [ddp.count(d, cpu) for d in ("1", "3", "all")] == [1, 3, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [ddp.count(d, gpu) for d in ("1", "3", "all")] == [1, 3, 4]
    no = refused("devices is", call=ddp.count)
    for wrong in ("0", "", "two", "-1", "1.5", "²", "9" * 5000):
        no(wrong, cpu)
    no("5", gpu)
    refused("first GPU", call=ddp.count)("2", torch.device("cuda:1"))


def begin(some, run, number="2", **options):
    """Return the network of a pre-training in a run folder, and its records to come."""
    network = backbones.build("resnet18", 2, some.images, 0)
    job = PRETRAIN | {"epochs": 3, "checkpoint": run.checkpoint, "place": CPU} | options
    return network, ddp.run(number, pretrain.train, network, some.images, "simclr", **job)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits_or_with_another_number(some, tmp_path):
    """Left after the second record: rank 0 has waited for it to be taken, and the checkpoint is of the epoch before."""
    whole, steps = begin(some, runs.start(tmp_path / "whole"))
    assert [record["epoch"] for record in steps] == [1, 2, 3]
    run = runs.start(tmp_path / "run", devices="2")
    _, steps = begin(some, run)
    next(steps), next(steps)
    steps.close()
    kept = run.checkpoint.read_bytes()
    _, about = checkpoints.read_tensors(run.checkpoint)
    assert about["epoch"] == "1"
    network, steps = begin(some, run)
    assert [record["epoch"] for record in steps] == [2, 3]
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in network.state_dict().items())
    run.checkpoint.write_bytes(kept)
    runs.start(tmp_path / "run", devices="1")  # which is the same run
    assert [record["epoch"] for record in begin(some, run, "1")[1]] == [2, 3]


@pytest.mark.slow
def test_fine_tuning_fills_the_history_and_every_module(some, tmp_path):
    """A rest of 4 rows that would be shards of too few joins the batch before; the average comes back, too."""
    network = backbones.build("resnet18", 2, some.images, 0)
    head = backbones.head(network.num_features, 10)
    average, history = finetune.ema(network, head, 0.5), np.full((2, 68), np.nan, np.float32)
    records = list(ddp.run("3", finetune.train, network, head, some.images[:68], some.labels_given[:68], "full", 2,
                           batch_size=32, place=CPU, validation=0, average=average, history=history,
                           test=(some.images, some.labels_true)))  # fmt: skip
    assert [record["epoch"] for record in records] == [1, 2] and np.isfinite(history).all()
    for record, margins in zip(records, history, strict=True):
        assert record["accuracy_train"] == pytest.approx((margins > 0).mean())
    found, expected = torch.nn.Sequential(network, head).state_dict(), average.module.state_dict()
    assert head[1].weight.any() and all(torch.equal(found[k], v) for k, v in expected.items())
    assert average.n_averaged == 4


def test_a_lost_process_is_named_and_the_run_can_go_on():
    for job in (shared_jobs.unlucky, shared_jobs.killed):
        steps = ddp.run("2", job, place=CPU)
        assert next(steps) == {"epoch": 1}
        refused("of 2", "run again, it goes on where it was", call=list)(steps)


@pytest.mark.slow
def test_what_a_loop_says_is_said(some):
    """Of a mistake, as by one process; of a loss that diverges."""
    refused("unknown augmentation 'none such'", call=list)(begin(some, runs.Run("x"), augmentation="none such")[1])
    refused("nothing to train", call=list)(begin(some, runs.Run("x"), batch_size=3, checkpoint=None)[1])
    with pytest.raises(FloatingPointError, match="not finite in epoch 1; nothing was kept"):
        list(begin(some, runs.Run("x"), checkpoint=None, learning_rate=float("inf"))[1])


def test_an_error_here_ends_the_others():
    steps = ddp.run("2", shared_jobs.endless, place=CPU)
    ids = next(steps)["ids"]
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    for each in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(each, 0)


SCRIPT = """
import shared_jobs
from ptglab.train import ddp
for record in ddp.run("2", shared_jobs.endless, place=shared_jobs.CPU):
    print(record, flush=True)
"""
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say that a parent was killed")
@pytest.mark.slow
def test_the_others_end_with_the_first():
    """The process that began the run is killed: the pipe that all of them hold comes to its end."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline()
        first.kill()
        first.communicate(timeout=300)  # until the last of them has let go of it


TORCHRUN = """
import os
from ptglab import backbones, data, ddp, engine, pretrain
images = data.load("digits").subset(64, 0).images
network = backbones.build("resnet18", 2, images, 0)
options = {"epochs": 2, "batch_size": 30, "projection": 16, "augmentation": "digits", "place": engine.place("cpu")}
losses = [record["loss"] for record in ddp.joined(pretrain.train, network, images, "simclr", **options)]
if os.environ["RANK"] == "0":
    print(*losses)
    backbones.save("model.safetensors", network)
"""


@pytest.mark.slow
def test_torchrun_trains_the_same_network(digits, tmp_path):
    """The script of the docstring, to the bits of two processes started here."""
    (tmp_path / "train.py").write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    images = digits.subset(64, 0).images
    network = backbones.build("resnet18", 2, images, 0)
    same = {"epochs": 2, "batch_size": 30, "projection": 16, "augmentation": "digits", "place": CPU}
    losses = [record["loss"] for record in ddp.run("2", pretrain.train, network, images, "simclr", **same)]
    assert list(map(float, done.stdout.split())) == losses
    kept, _ = backbones.load(tmp_path / "model.safetensors")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in kept.state_dict().items())


@pytest.mark.slow
def test_notebook_9_trains_its_networks_together(tmp_path):
    """The folds and the network, by two processes; every margin comes back."""
    command = [sys.executable, "-c", "from ptglab.cli import main; main()", "run", "09_one_experiment", "out.ipynb"]
    values = {"run_dir": "run", "device": "cpu", "devices": 2, "subset": 64, "width": 2, "epochs": 2, "batch_size": 30,
              "epochs_fold": 1, "recipe": "ema"}  # fmt: skip
    for name, value in values.items():
        command += ["-p", f"{name}={value}"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    stage = runs.Run(tmp_path / "run").stage("supervised")
    assert len(stage.records()) == 2 and np.isfinite(stage.array("history")).all()
    assert stage.array("history").shape == (2, 64)
