"""One network trained by two and by four processes: the same steps as alone; lost processes; torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import shared_jobs
import torch
from expected import refused

from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.train import backbones, engine, pretrain, processes

NUMBERS = ["2", "4"]
PRETRAIN = {"epochs": 1, "batch_size": 30, "projection": 16, "augmentation": "digits", "seed": 3}
FINETUNE = {"mode": "full", "epochs": 2, "batch_size": 32, "augmentation": "weak_digits", "validation": 0.25, "seed": 3}


@pytest.fixture(scope="module")
def some(digits):
    return digits.subset(94, seed=0)


@pytest.fixture(scope="module")
def trainings(some):
    """{number of processes: (what `shared_jobs.trained` yields: three steps a method, then six; the history)}."""
    done, options = {}, {"pretraining": PRETRAIN, "finetuning": FINETUNE, "width": 4, "place": shared_jobs.CPU}
    for number in ["1", *NUMBERS]:
        history = np.zeros((2, 94), np.float32)
        job = shared_jobs.trained, some.images, some.labels_given
        done[number] = list(processes.run(number, *job, history=history, **options)), history
    return done


def relative(many, one) -> float:
    """Return the largest difference of tensors, relative to the largest entry of each."""
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("i, method", list(enumerate(pretrain.METHODS)))
def test_every_step_is_that_of_one_process(trainings, number, i, method):
    """Losses, gradients, and weights and running statistics after an epoch, in float64; 30 rows are not 4 equal shares.

    In float32 the roundings of one process, whose batch norm is PyTorch's, grow by themselves, beyond 1e-2.
    """
    many, one = trainings[number][0][i], trainings["1"][0][i]
    assert len(many["losses"]) == len(many["gradients"]) == 3
    assert len({round(loss, 6) for loss in one["losses"]}) == 3
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-9)
    for a, b in zip(many["gradients"], one["gradients"], strict=True):
        assert relative(a, b) < 1e-8
    assert relative(many["weights"].values(), one["weights"].values()) < 1e-8
    assert many["same"]
    assert many["records"][0]["loss"] == pytest.approx(one["records"][0]["loss"], rel=1e-6)


@pytest.mark.parametrize("number", NUMBERS)
def test_fine_tuning_is_that_of_one_process(trainings, number):
    """Batches of 32, 32 and 7 or 6: the last one is not shared evenly; margins of all rows come to process 0."""
    (*_, many), margins = trainings[number]
    (*_, one), expected = trainings["1"]
    assert len(many["gradients"]) == len(one["gradients"]) == 6
    for a, b in zip(many["gradients"], one["gradients"], strict=True):
        assert relative(a, b) < 1e-8
    assert relative(many["weights"].values(), one["weights"].values()) < 1e-8
    assert many["same"]
    np.testing.assert_allclose(margins, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(many["records"], one["records"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in b.items() if k != "seconds"}, rel=1e-6
        )


def test_one_is_only_called():
    given = engine.place("cpu")
    assert processes.run("1", lambda *args, **kwargs: (args, kwargs), 1, x=2, place=given) == (
        (1,),
        {"x": 2, "place": given},
    )


def test_devices_are_counted(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [processes.count(d, cpu) for d in ("1", "3", "all")] == [1, 3, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [processes.count(d, gpu) for d in ("1", "3", "all")] == [1, 3, 4]
    no = refused("devices is", call=processes.count)
    for wrong in ("0", "", "two", "-1", "1.5", "²", "9" * 5000):
        no(wrong, cpu)
    no("5", gpu)
    refused("first GPU", call=processes.count)("2", torch.device("cuda:1"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert [processes.count(d, gpu) for d in ("1", "all", "6")] == [1, 6, 6]
    refused("torchrun has started 6", call=processes.count)("3", gpu)


def begin(some, run, number="2", **options):
    """Return the network of a pre-training in a run folder, and its records to come."""
    network = backbones.build("resnet18", 2, some.images, 0)
    job = PRETRAIN | {"epochs": 3, "checkpoint": run.checkpoint, "place": engine.place("cpu")} | options
    return network, processes.run(number, pretrain.train, network, some.images, "simclr", **job)


@pytest.fixture
def helpers(monkeypatch):
    """The other processes that are started, as Popen."""
    started, popen = [], subprocess.Popen

    def noted(*args, **kwargs):
        process = popen(*args, **kwargs)
        if processes.BOOT in args[0]:
            started.append(process)
        return process

    monkeypatch.setattr(processes.subprocess, "Popen", noted)
    return started


@pytest.fixture(scope="module")
def whole(some, tmp_path_factory):
    """The state of a run of two processes that nothing befell."""
    network, steps = begin(some, runs.start(tmp_path_factory.mktemp("whole") / "run"))
    list(steps)
    return network.state_dict()


def test_a_lost_process_stops_the_run_and_it_goes_on(some, helpers, whole, tmp_path):
    """Killed after the first epoch; run again, by two, to the bits of a run that was not; records count once."""
    run = runs.start(tmp_path / "run")
    _, steps = begin(some, run)
    next(steps), next(steps)
    helpers[0].kill()
    clock = time.monotonic()
    refused("process 1 of this run (0 to 1) was killed by signal 9", "run again", call=list)(steps)
    assert time.monotonic() - clock < 20
    assert "GLOO_SOCKET_IFNAME" not in os.environ and not torch.distributed.is_initialized()
    network, steps = begin(some, run)
    assert [record["epoch"] for record in steps] in ([2, 3], [3])
    assert all(torch.equal(v, whole[k]) for k, v in network.state_dict().items())
    assert [helper.returncode for helper in helpers] == [-9, 0]


def test_a_run_goes_on_with_another_number(some, tmp_path):
    run = runs.start(tmp_path / "run", devices="2")
    _, steps = begin(some, run)
    next(steps), next(steps)
    steps.close()
    runs.start(tmp_path / "run", devices="1")  # which is the same run
    assert [record["epoch"] for record in begin(some, run, "1")[1]] == [2, 3]


def test_what_another_process_says_is_told(some, helpers, monkeypatch):
    """It cannot do the job; this one, which waits for it, says why."""
    with pytest.raises(InputError, match="process 1 of this run .* ended: RuntimeError: no luck here"):
        list(processes.run("2", shared_jobs.unlucky, place=engine.place("cpu")))
    monkeypatch.setattr(processes, "BOOT", "import sys; sys.exit('no such module')")
    with pytest.raises(InputError, match="process 1 of this run .* ended: no such module"):
        list(processes.run("2", shared_jobs.primitives, place=engine.place("cpu")))


def test_an_error_here_ends_the_others(some, helpers):
    _, steps = begin(some, runs.Run("nowhere"), checkpoint=None, epochs=100)
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert helpers[0].returncode == -9
    refused("unknown augmentation", call=list)(begin(some, runs.Run("nowhere"), augmentation="none such")[1])


SCRIPT = """
import sys
import ptglab, shared_jobs
from ptglab.train import processes
for record in processes.run("3", getattr(shared_jobs, sys.argv[1]), place=shared_jobs.CPU):
    print(record, flush=True)
"""


def script(job: str) -> subprocess.Popen:
    """Start three processes that do a job of shared_jobs, and yield the ids of the others at first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, job], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def alive(process: int) -> bool:
    """Whether a process has not ended after a few seconds."""
    end = time.monotonic() + 5
    with suppress(OSError):
        while Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z":
            if time.monotonic() > end:
                return True
            time.sleep(0.05)
    return False


def test_the_others_end_with_the_first():
    """Process 0 is killed, whole: the others say so where its own messages went, and end."""
    with script("endless") as process:
        ids = json.loads(process.stdout.readline())
        assert len(set(ids)) == 3
        process.kill()
        clock = time.monotonic()
        said = process.stderr.read()  # until the last of them has let go of it
        assert time.monotonic() - clock < 20
    assert said.splitlines() == [processes.GONE] * 2
    assert not any(map(alive, ids))


@pytest.mark.slow
def test_a_process_that_waits_for_ever_is_ended():
    """As on a GPU, where nobody is told that another is gone."""
    with script("waiting") as process:
        ids = json.loads(process.stdout.readline())
        os.kill(ids[1], signal.SIGKILL)
        clock = time.monotonic()
        said = process.stderr.read()
        assert time.monotonic() - clock < 60
        assert process.wait() == 1
    assert "ptglab: process 1 of this run is gone; run again, it goes on where it was" in said
    assert not any(map(alive, ids))


NOTEBOOK = {"device": "cpu", "subset": 64, "width": 2, "epochs": 2, "batch_size": 30}
COMMAND = [sys.executable, "-c", "from ptglab.cli import main; main()", "run"]


def execute(name: str, out: Path, *before: str, **values) -> str:
    """Execute a notebook by the command line in a folder of its own; return what it said."""
    command = [*before, *COMMAND, name, f"{out.name}.ipynb", "-p", f"run_dir={out.name}"]
    for key, value in values.items():
        command += ["-p", f"{key}={value}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_torchrun_trains_the_same_network(digits, tmp_path):
    """Notebook 2 by `torchrun --nproc-per-node 2`, to the bits of two processes started here; and again, when done."""
    options = NOTEBOOK | {"devices": "all", "data_run": "", "projection": 16}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    assert "running on 2 x cpu" in execute("02_pretrain", tmp_path / "two", *torchrun, **options)
    some = digits.subset(64, 0)
    network = backbones.build("resnet18", 2, some.images, 0)
    same = {"epochs": 2, "batch_size": 30, "projection": 16, "augmentation": "digits", "schedule": "short"}
    records = list(processes.run("2", pretrain.train, network, some.images, "simclr", place=shared_jobs.CPU, **same))
    run = runs.Run(tmp_path / "two")
    assert run.done and list(run.records()["loss"]) == [record["loss"] for record in records]
    kept, _ = backbones.load(run.weights)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in kept.state_dict().items())
    execute("02_pretrain", tmp_path / "two", *torchrun, **options)  # nothing is left to do, and nobody waits


@pytest.mark.slow
def test_notebook_9_trains_its_networks_together(tmp_path):
    """The folds and the network, by two processes and by one: the first epoch is the same up to rounding."""
    for devices in ("1", "2"):
        said = execute("09_one_experiment", tmp_path / devices, devices=devices, epochs_fold=1, **NOTEBOOK)
        assert f"running on {devices} x cpu" in said
    one, two = (runs.Run(tmp_path / devices) for devices in ("1", "2"))
    for stage in ("supervised", next(path.name for path in two.path.glob("folds-*"))):
        expected, found = (run.stage(stage).records()["loss"] for run in (one, two))
        assert len(found) == len(expected) == 2
        assert found[0] == pytest.approx(expected[0], rel=1e-3)
    assert two.stage("supervised").array("history").shape == (2, 64)
    assert np.isfinite(two.stage("supervised").array("history")).all()
