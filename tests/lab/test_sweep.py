"""Sweeps of small notebooks that start fast, and the smoke sweep of the real ones with one cell made to fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from ptglab.errors import InputError
from ptglab.lab import spec
from ptglab.lab import sweeps as sweep

PARAMETERS = (
    'run_dir = "run"  # where\nseed = 0  # of nothing\nkind = "a"  # a kind\nbefore = ""  # a stage\nwait = 0.0  # s\n'
)
WRITES = """
import csv, os, pathlib, time
pathlib.Path("here").write_text(f"{os.getcwd()} {os.getpid()}")
left = globals().get("leak", "nothing")
leak = "something"
(pathlib.Path(run_dir) / "pid").write_text(str(os.getpid()))
time.sleep(wait)
if kind == "bad":
    raise ValueError("a cell made to fail")
stage = pathlib.Path(before, "value").read_text() if before else ""
pathlib.Path(run_dir, "value").write_text(f"stage of {seed}")
with open(pathlib.Path(run_dir) / "results.csv", "w") as file:
    csv.writer(file).writerows([["seed", "noise", "detector", "init"], [seed, kind, stage, left]])
"""


def write_notebook(path: Path, body: str = WRITES) -> str:
    def cell(source, tags=()):
        return {"cell_type": "code", "id": f"c{len(source)}", "metadata": {"tags": list(tags)}, "source": source,
                "outputs": [], "execution_count": None}  # fmt: skip

    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": [cell(PARAMETERS, ["parameters"]), cell(body)], "metadata": kernel,
                                "nbformat": 4, "nbformat_minor": 5}))  # fmt: skip
    return str(path)


@pytest.fixture
def planned(tmp_path):
    """Return a function from grids (and stages) to the cells of a sweep of the small notebook."""
    notebook = write_notebook(tmp_path / "small.ipynb")

    def plan(*grids: dict, **stages: dict) -> list[spec.Cell]:
        parts = {name: spec.Stage(notebook=notebook, parameters=p) for name, p in stages.items()}
        return spec.plan(
            spec.Spec(title="t", stages=parts, grids=[spec.Part(notebook=notebook, parameters=g) for g in grids])
        )

    return plan


def states(events) -> dict[str, str]:
    return {event.cell.name: event.state for event in events}


def test_cells_run_in_a_kernel_and_a_folder_of_their_own(planned, tmp_path):
    cells = planned({"seed": [2, 0]})
    events = list(sweep.run(cells, tmp_path / "out", jobs=2))
    assert [e.state for e in events].count("finished") == 2 and not any(e.error for e in events)
    places = [(tmp_path / "out" / cell.name / "here").read_text().split() for cell in cells]
    assert [Path(folder) for folder, _ in places] == [tmp_path / "out" / cell.name for cell in cells]
    assert len({process for _, process in places}) == 2
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert results["seed"].tolist() == [2, 0]  # the order of the plan, whichever was first
    assert set(results["init"]) == {"nothing"}


def test_what_is_finished_is_not_run_again_and_what_failed_is(planned, tmp_path):
    cells, out = planned({"seed": [0, 1]}), tmp_path / "out"
    list(sweep.run(cells[:1], out))
    before = (out / cells[0].name / "pid").read_text()
    assert states(sweep.run(cells, out)) == {cells[0].name: "skipped", cells[1].name: "finished"}
    assert (out / cells[0].name / "pid").read_text() == before
    (out / cells[1].name / "notebook.ipynb").unlink()
    assert states(sweep.run(cells, out))[cells[1].name] == "finished"
    assert len(pd.read_csv(out / "results.csv")) == 2


def test_a_stage_runs_once_and_its_failure_blocks_what_needs_it(planned, tmp_path):
    cells = planned(
        {"kind": ["x", "y"], "before": "@good"},
        {"kind": "z", "before": "@broken", "seed": 3},
        good={"kind": "stage"},
        broken={"kind": "bad"},
    )
    assert [cell.name.split("-")[0] for cell in cells[:2]] == ["stages/good", "stages/broken"] and len(cells) == 5
    events = list(sweep.run(cells, tmp_path / "out", jobs=2))
    said = {e.cell.name: e for e in events if e.state in ("failed", "blocked")}
    assert {e.state for e in said.values()} == {"failed", "blocked"} and len(said) == 2
    blocked = next(e for e in said.values() if e.state == "blocked")
    assert blocked.cell.parameters["kind"] == "z" and "stages/broken-seed3" in blocked.error
    assert sum("ValueError: a cell made to fail" in e.error for e in said.values()) == 1
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    shared = results[results["noise"].isin(["x", "y"])]
    assert shared["detector"].tolist() == ["stage of 0"] * 2


def test_a_second_sweep_in_the_same_folder_is_refused(planned, tmp_path):
    cells = planned({"seed": 0})
    first = sweep.run(cells, tmp_path / "out")
    next(first)
    with pytest.raises(InputError, match=f"another sweep is at work in .*: process {os.getpid()}"):
        next(sweep.run(cells, tmp_path / "out"))
    list(first)
    assert states(sweep.run(cells, tmp_path / "out")) == {cells[0].name: "skipped"}


SWEEP = """
import sys
from ptglab.cli import main
sys.argv = ["ptglab", "sweep", *sys.argv[1:]]
main()
"""


def command(*words: str, **options) -> subprocess.Popen:
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SWEEP, *words], **options)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what becomes of orphans is told from /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_sweep_leaves_no_kernel_and_goes_on(tmp_path, how):
    """Killed while its second cell runs: the kernel ends too, and a rerun ends with what an undisturbed one has."""
    notebook = write_notebook(tmp_path / "small.ipynb")
    text = {"title": "t", "grids": [{"notebook": notebook, "parameters": {"wait": [0.0, 3.0]}}]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(text))
    out = tmp_path / "out"
    process = command(str(tmp_path / "s.yaml"), "--out", str(out))
    slow = next(c for c in spec.plan(spec.read(tmp_path / "s.yaml")) if c.parameters["wait"])
    until((out / slow.name / "pid").exists)
    until(lambda: (out / slow.name / "pid").read_text() != "")
    kernel = int((out / slow.name / "pid").read_text())
    assert alive(kernel)
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    assert "Traceback" not in said and process.returncode == {signal.SIGKILL: -9}.get(how, 130)
    until(lambda: not alive(kernel), 15)
    assert len(pd.read_csv(out / "results.csv")) == 1
    again, undisturbed = (
        command(str(tmp_path / "s.yaml"), "--out", str(out)),
        command(str(tmp_path / "s.yaml"), "--out", str(tmp_path / "other")),
    )
    told = again.communicate(timeout=60)[0]
    undisturbed.communicate(timeout=60)
    assert again.returncode == undisturbed.returncode == 0 and "1 finished now, 1 before, 0 failed" in told
    assert (out / "results.csv").read_text() == (tmp_path / "other" / "results.csv").read_text()


def test_the_time_left_is_told_from_what_cells_took(planned, tmp_path):
    cells = planned({"seed": [0, 1, 2, 3]})
    assert pd.isna(sweep.estimate(cells, tmp_path, 1))
    (tmp_path / "cells.csv").write_text(f"cell,notebook,seconds\na,{cells[0].notebook},4\nb,{cells[0].notebook},6\n")
    assert sweep.estimate(cells, tmp_path, 2) == 4 * 5 / 2
    (tmp_path / cells[0].name).mkdir(parents=True)
    (tmp_path / cells[0].name / "notebook.ipynb").write_text("{}")
    assert sweep.estimate(cells, tmp_path, 1) == 3 * 5


def test_smoke_with_one_cell_made_to_fail(tmp_path):
    """The real notebooks: the exit status counts the failures, the report names them, the others are whole."""
    bad = write_notebook(tmp_path / "bad.ipynb")
    smoke = yaml.safe_load((Path(__file__).parents[2] / "notebooks" / "sweeps" / "smoke.yaml").read_text())
    smoke["grids"].insert(1, {"notebook": bad, "parameters": {"kind": "bad"}})
    (tmp_path / "smoke.yaml").write_text(yaml.safe_dump(smoke))
    process = command(str(tmp_path / "smoke.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2", cwd=tmp_path)
    told, said = process.communicate(timeout=300)
    assert process.returncode == 1, told + said
    assert "5 finished now, 0 before, 1 failed" in told
    report = next(line for line in told.splitlines() if line.startswith("failed: "))
    assert bad in report and "ValueError: a cell made to fail" in report and "log.txt" in report
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(results) == 2 + 2 + 1 and results["accuracy_last"].between(0, 1).all()
    assert set(zip(results["init"], results["recipe"], strict=True)) == {
        ("scratch", "plain"), ("simclr", "plain"), ("simclr", "clean_relabel")}  # fmt: skip
    assert len(list((tmp_path / "out" / "stages").iterdir())) == 1
    curves = pd.read_csv(tmp_path / "out" / "curves.csv")
    assert {"learned_right", "learned_wrong", "accuracy_test", "epoch", "seed"} <= set(curves.columns)
