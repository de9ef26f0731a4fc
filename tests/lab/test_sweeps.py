"""Sweeps: what runs when, what is left and what is refused; on this machine and on Dask, undisturbed and killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import yaml
from expected import refused
from tiny_notebooks import gone, until, write_notebook

from ptglab import files
from ptglab.lab import board, spec, sweeps

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
PARAMETERS = 'run_dir = "r"  # where\nseed = 0  # any\nkind = "a"  # any\nbefore = ""  # a stage\ngate = ""  # a file\n'
BODY = """
import os, pathlib, time
run = pathlib.Path(run_dir)
(run / "kernel").write_text(f"{os.getpid()} {os.getcwd()}")
while gate and not os.path.exists(gate):  # the test opens it
    time.sleep(0.05)
if kind == "bad":
    raise ValueError("a cell made to fail")
stage = pathlib.Path(before, "value").read_text() if before else "none"
(run / "value").write_text(f"stage of {seed}")
(run / "results.csv").write_text(f"seed,noise,detector\\n{seed},{kind},{stage}\\n")
"""


@pytest.fixture
def planned(tmp_path):
    """Return a function from grids (and stages) to the cells of a sweep of the small notebook."""
    notebook = write_notebook(tmp_path / "small.ipynb", PARAMETERS, BODY)

    def plan(*grids: dict, **stages: dict) -> list[spec.Cell]:
        parts = {name: spec.Stage(notebook=notebook, parameters=p) for name, p in stages.items()}
        grids = [spec.Part(notebook=notebook, parameters=grid) for grid in grids]
        return spec.plan(spec.Spec(title="t", stages=parts, grids=grids))

    return plan


@pytest.fixture
def shared(planned):
    """Two cells that share a stage, and one whose stage fails."""
    return planned({"kind": ["x", "y"], "before": "@good"}, {"kind": "z", "before": "@broken", "seed": 3},
                   good={"kind": "stage"}, broken={"kind": "bad"})  # fmt: skip


@pytest.fixture
def executed(monkeypatch):
    """The cells that were executed, which here takes no process; a `kind` "bad" fails."""
    seen = []

    def execute(cell, out, jobs, stopped):
        seen.append(cell)
        folder = out / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        if cell.parameters["kind"] == "bad":
            return 0.0, "ValueError: bad", ""
        (folder / "results.csv").write_text(f"seed,noise\n{cell.parameters['seed']},{cell.parameters['kind']}\n")
        end(folder)
        return 2.0, "", "here"

    monkeypatch.setattr(sweeps, "execute", execute)
    return seen


def end(folder: Path) -> None:
    """Leave in a cell's folder what a finished one does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notebook.ipynb").write_text("{}")
    files.write_json(folder / spec.MARK, spec.left(folder))


def states(events) -> dict[str, str]:
    return {event.cell.name: event.state for event in events}


# ---- what runs when


def test_stages_run_once_and_first_and_a_failed_one_blocks_what_needs_it(shared, executed, tmp_path):
    events = list(sweeps.run(shared, tmp_path, jobs=2))
    assert [cell.name.split("-")[0] for cell in executed[:2]] == ["stages/good", "stages/broken"] and len(executed) == 4
    found = states(events)
    assert [found[cell.name] for cell in shared] == ["finished", "failed", "finished", "finished", "blocked"]
    blocked = next(event for event in events if event.state == "blocked")
    assert shared[1].name in blocked.error
    assert pd.read_csv(tmp_path / "results.csv")["noise"].tolist() == ["stage", "x", "y"]  # the order of the plan
    log = (tmp_path / "log.txt").read_text()
    assert len(log.splitlines()) == 9 and "failed" in log and "ValueError: bad" in log


def test_what_is_finished_is_not_run_again_and_what_failed_is(shared, executed, tmp_path):
    list(sweeps.run(shared[:1], tmp_path))
    executed.clear()
    assert states(sweeps.run(shared[:2], tmp_path)) == {shared[0].name: "skipped", shared[1].name: "failed"}
    assert states(sweeps.run(shared[:2], tmp_path))[shared[1].name] == "failed" and executed == [shared[1]] * 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_cells_run_at_a_time_as_asked(planned, tmp_path, monkeypatch, jobs):
    """With two, both meet at a barrier; with one, nobody else is there."""
    meeting, inside = threading.Barrier(jobs), []

    def execute(cell, *_):
        inside.append(cell)
        meeting.wait(300)
        assert len(inside) <= jobs
        meeting.wait(300)
        inside.remove(cell)
        return 1.0, "", ""

    monkeypatch.setattr(sweeps, "execute", execute)
    assert set(states(sweeps.run(planned({"seed": [0, 1, 2, 3]}), tmp_path, jobs)).values()) == {"finished"}


def test_a_sweep_that_is_left_stops_its_cells_and_another_waits_for_it_to_end(planned, tmp_path, monkeypatch):
    seen = threading.Event()

    def execute(cell, out, jobs, stopped):
        seen.set()
        until(stopped)
        return 0.0, "stopped", ""

    monkeypatch.setattr(sweeps, "execute", execute)
    events = sweeps.run(planned({"seed": 0}), tmp_path)
    assert next(events).state == "started"
    assert seen.wait(300)
    call = refused("another sweep is at work in", f"process {os.getpid()}", call=lambda: next(sweeps.run([], tmp_path)))
    call()
    events.close()
    assert not list(sweeps.run([], tmp_path))


def test_the_time_left_follows_from_what_cells_took(planned, tmp_path):
    cells = planned({"seed": [0, 1, 2, 3]})
    assert pd.isna(sweeps.estimate(cells, tmp_path, 1))
    (tmp_path / "cells.csv").write_text(f"cell,notebook,seconds\na,{cells[0].notebook},4\nb,{cells[0].notebook},6\n")
    assert sweeps.estimate(cells, tmp_path, 2) == 4 * 5 / 2
    end(tmp_path / cells[0].name)
    assert sweeps.estimate(cells, tmp_path, 1) == 3 * 5


def test_where_no_folder_can_be_is_one_line(planned, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / path for path in ("file", "loop", "loop/a/b", "n" * 300)):
        refused(f"cannot write {out}: ", call=lambda out: next(sweeps.run([], out)))(out)
    assert sweeps.estimate([], tmp_path / "loop", 1) == 0


def test_texts_of_cells_are_gathered_without_a_second_escape(planned, tmp_path):
    cells = planned({"seed": [0, 1]})
    for cell, name in zip(cells, ["=1+1", "'plain"], strict=True):
        (tmp_path / cell.name).mkdir(parents=True)
        files.write_csv(tmp_path / cell.name / "results.csv", pd.DataFrame({"dataset": [name], "commit": ["0123"]}))
        end(tmp_path / cell.name)
    sweeps.gather(cells, tmp_path)
    assert files.read_csv(tmp_path / "results.csv")["dataset"].tolist() == ["=1+1", "'plain"]
    assert '"\'=1+1"' in (tmp_path / "results.csv").read_text()


def test_the_board_says_every_end_of_a_cell_and_failures_again(shared, tmp_path, capsys):
    end(tmp_path / shared[0].name)
    board.plan("A [b]title\x1b[0m", shared, tmp_path, 2)
    said = capsys.readouterr().out
    for words in (
        "A [b]title\\x1b[0m: 5 executions",
        shared[3].name,
        "shared by 2 cells",
        "finished",
        "to run",
        "unknown",
    ):
        assert words in said, words
    ends = [("skipped", 0, ""), ("started", 0, ""), ("finished", 12.4, ""), ("failed", 3.0, "ValueError: no")]
    events = [sweeps.Event(cell, *end) for cell, end in zip(shared, ends, strict=False)]
    assert board.watch("t", events, shared, tmp_path, 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"finished {shared[2].name} in 12 s" and lines[1].startswith(f"failed {shared[3].name} in 3 s")
    assert lines[2] == "t: 1 finished now, 1 before, 1 failed"
    assert "ValueError: no" in lines[3] and lines[3].endswith(str(tmp_path / shared[3].name / "log.txt"))
    assert [board.duration(s) for s in (0, 59.6, 7260, float("nan"))] == ["0 s", "1 min 0 s", "2 h 1 min", "unknown"]


# ---- real processes


def command(*words: str, **options) -> subprocess.Popen:
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "ptglab", "sweep", *words], **options)


def kernel(folder: Path) -> int:
    """Return the process of the kernel that executes the cell of a folder, once there is one."""
    return int(until(lambda: (folder / "kernel").exists() and (folder / "kernel").read_text().split())[0])


def test_cells_run_in_a_kernel_and_a_folder_of_their_own(planned, tmp_path):
    cells, out = planned({"seed": [2, 0]}, {"kind": "bad"}), tmp_path / "out"
    events = list(sweeps.run(cells, out, jobs=2))
    assert sorted(states(events).values()) == ["failed", "finished", "finished"]
    places = [(out / cell.name / "kernel").read_text().split() for cell in cells]
    assert [Path(folder) for _, folder in places] == [out / cell.name for cell in cells]
    assert len({process for process, _ in places}) == 3
    assert pd.read_csv(out / "results.csv")["seed"].tolist() == [2, 0]
    assert next(e.error for e in events if e.error).startswith("ValueError: a cell made to fail (cell 3 of ")
    assert "ValueError" in (out / cells[2].name / "log.txt").read_text()
    assert (out / cells[2].name / "failed-notebook.ipynb").exists()


def test_a_value_that_no_command_can_hold_fails_in_a_line(planned, tmp_path):
    [event] = [e for e in sweeps.run(planned({"kind": "a\0b"}), tmp_path) if e.state != "started"]
    assert event.state == "failed" and event.error.startswith("cannot be started: ")


# ---- on Dask


@pytest.fixture
def local():
    """A function that makes a cluster whose workers are threads of this process, which sees what is patched."""
    from distributed import LocalCluster

    made, options = [], {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}

    def make(**more):
        made.append(LocalCluster(1, threads_per_worker=2, processes=False, memory_limit=0, **options, **more))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def two_workers():
    """A cluster of two worker processes, which their nannies start again."""
    from distributed import LocalCluster

    with LocalCluster(2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0",
                      worker_dashboard_address="127.0.0.1:0", memory_limit=0) as cluster:  # fmt: skip
        cluster.wait_for_workers(2)
        yield cluster


def killed(folder: Path) -> None:
    """Kill the worker that executes the cell of a folder."""
    [pid] = re.findall(r"by process (\d+)", (folder / "log.txt").read_text())
    os.kill(int(pid), signal.SIGKILL)


def test_a_cluster_does_what_one_machine_does(shared, executed, tmp_path, local):
    """A scheduler's file will do for its address."""
    (tmp_path / "scheduler.json").write_text(json.dumps({"id": "x", "address": local().scheduler_address}))
    here = states(sweeps.run(shared, tmp_path / "here"))
    there = states(sweeps.run(shared, tmp_path / "there", dask=str(tmp_path / "scheduler.json")))
    assert here == there and len(executed) == 8
    assert (tmp_path / "here" / "results.csv").read_text() == (tmp_path / "there" / "results.csv").read_text()


def test_cells_take_a_gpu_where_workers_declare_some(planned, tmp_path, local, monkeypatch):
    """Two threads and one GPU: one cell after the other."""
    inside, most = [], []

    def execute(cell, *_):
        inside.append(cell)
        most.append(len(inside))
        inside.remove(cell)
        return 1.0, "", ""

    monkeypatch.setattr(sweeps, "execute", execute)
    address = local(resources={"GPU": 1}).scheduler_address
    list(sweeps.run(planned({"seed": list(range(8))}), tmp_path, dask=address))
    assert most == [1] * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ptglab": "9.9"}, ["runs ptglab", "this is 9.9", "install the same"]),
        ({"sees": "other"}, ["shared file system"]),
    ],
)
def test_workers_that_do_not_fit_are_refused_before_the_first_cell(
    planned, executed, tmp_path, local, monkeypatch, change, words
):
    real, asked = sweeps.about, []

    def about(out, dask_worker=None):
        asked.append(out)
        return real(out, dask_worker) | (change if len(asked) == 1 else {})

    monkeypatch.setattr(sweeps, "about", about)
    address = local().scheduler_address
    refused(*words, call=lambda: list(sweeps.run(planned({"seed": 0}), tmp_path, dask=address)))()
    assert not executed


@pytest.mark.parametrize("address", ["nonsense", "foo://x:1", "tcp://127.0.0.1:port", "scheduler.json"])
def test_where_no_scheduler_can_be_the_address_is_named(planned, tmp_path, address, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scheduler.json").write_text("{}")
    refused(f"no Dask scheduler answers at {address}", call=list)(sweeps.run(planned({"seed": 0}), "out", dask=address))


def test_without_dask_the_mend_is_named(planned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused("Dask is not installed", "pip install", call=list)(
        sweeps.run(planned({"seed": 0}), tmp_path, dask="tcp://x:1")
    )


@pytest.mark.slow
def test_a_scheduler_that_goes_ends_the_sweep_in_a_line(planned, tmp_path, local, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    monkeypatch.setattr(sweeps, "execute", lambda *_: (entered.set(), leave.wait(300), (1.0, "", ""))[-1])
    cluster = local()
    events = sweeps.run(planned({"seed": 0}), tmp_path, dask=cluster.scheduler_address)
    assert next(events).state == "started" and entered.wait(300)
    cluster.close()
    refused("the Dask scheduler is gone", files.GO_ON, call=list)(events)
    leave.set()


@linux
def test_a_killed_workers_cell_is_begun_again_by_another(planned, tmp_path, two_workers):
    gate, out = tmp_path / "gate", tmp_path / "out"
    cells = planned({"seed": 1, "before": "@good"}, good={"kind": "stage", "gate": str(gate)})
    events = sweeps.run(cells, out, dask=two_workers.scheduler_address)
    assert next(events).state == "started"
    blocked = kernel(out / cells[0].name)
    killed(out / cells[0].name)
    until(lambda: gone(blocked))
    gate.touch()
    assert [e.state for e in events] == ["finished", "started", "finished"]
    assert (out / cells[0].name / "log.txt").read_text().count("begun ") == 2
    list(sweeps.run(cells, tmp_path / "undisturbed"))
    assert (out / "results.csv").read_text() == (tmp_path / "undisturbed" / "results.csv").read_text()


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["here", pytest.param("cluster", marks=pytest.mark.slow)])
def test_a_stopped_sweep_leaves_no_kernel_and_goes_on(request, tmp_path, how, where):
    notebook = write_notebook(tmp_path / "small.ipynb", PARAMETERS, BODY)
    gate, out = tmp_path / "gate", tmp_path / "out"
    text = {"title": "t", "grids": [{"notebook": notebook, "parameters": {"gate": ["", str(gate)]}}]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(text))
    cells = spec.plan(spec.read(tmp_path / "s.yaml"))
    dask = request.getfixturevalue("two_workers").scheduler_address if where == "cluster" else ""
    process = command(str(tmp_path / "s.yaml"), "--out", str(out), "--dask", dask)
    until((out / cells[0].name / spec.MARK).exists)
    blocked = kernel(out / cells[1].name)
    process.send_signal(how)
    _, said = process.communicate(timeout=300)
    assert "Traceback" not in said and process.returncode == {signal.SIGKILL: -9}.get(how, 130)
    until(lambda: gone(blocked))
    gate.touch()
    assert states(sweeps.run(cells, out, dask=dask)) == {cells[0].name: "skipped", cells[1].name: "finished"}
    assert pd.read_csv(out / "results.csv")["seed"].tolist() == [0, 0]
