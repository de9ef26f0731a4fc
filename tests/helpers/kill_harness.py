"""Runs that are killed at random moments and run again, beside the same runs undisturbed.

A run is the code of a notebook in a process of its own, or a sweep by the command line. It is killed (SIGKILL, whole)
at a moment drawn between its start and the time that the undisturbed run took, until its last stage is finished once;
then the folders are compared: weights, arrays, records and results to the bit, times aside.

By itself, `python tests/helpers/kill_harness.py 20 FOLDER` prints a line for each of that many kills.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import sklearn.datasets  # noqa: F401 - as what follows, once for every run, which is forked
import yaml
from safetensors import safe_open

from ptglab import files
from ptglab.data import noise  # noqa: F401
from ptglab.detect import cleaning, label_errors  # noqa: F401
from ptglab.lab import notebooks, runs
from ptglab.train import finetune, predict, pretrain  # noqa: F401

TIMES = ["seconds", "images_per_second", "seconds_pretrain", "seconds_finetune", "seconds_detect", "commit"]
TINY = {"subset": 128, "width": 2, "batch_size": 32}
PRETRAIN = {"data_run": "", "epochs": 40, "projection": 16, **TINY}
SCRATCH = {"epochs": 40, "epochs_fold": 5, **TINY}
SMALL_SWEEP = {
    "title": "two cells",
    "stages": {"simclr": {"notebook": "02_pretrain", "parameters": PRETRAIN}},
    "grids": [{"notebook": "09_one_experiment", "parameters": {"init": "simclr", "mode": "linear", "epochs": 20,
               "pretrain_run": "@simclr", "subset": 128, "batch_size": 32}}],
}  # fmt: skip


def execute_here(notebook: str, values: dict) -> None:
    """Run the code cells of a notebook in this process, `values` in the place of its parameters."""
    namespace = {"__name__": "__main__"}
    for cell in json.loads(notebooks.notebook_path(notebook).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace |= values


def begin_notebook(notebook: str, values: dict, out: Path) -> int:
    """Start the notebook in a forked process, which saves the imports, and return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        matplotlib.use("agg")
        runs.Run.save_figure = lambda run, name, figure, table=None: None  # half of the time, and not compared
        with open(out.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            execute_here(notebook, values | {"run_dir": str(out)})
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def begin_sweep(plan: dict, out: Path) -> int:
    """Start a sweep by the command line in a session of its own, and return its process id."""
    spec = out.with_suffix(".yaml")
    spec.write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-m", "ptglab", "sweep", str(spec), "--out", str(out)]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True).pid


def kinds(folder: Path) -> dict:
    """Return {what: how to start it in a folder}; the linear one stands on a pre-training that is finished here."""
    before = folder / "before"
    if not (before / "done").exists():
        assert ended(begin_notebook("02_pretrain", PRETRAIN, before)) == 0, before.with_suffix(".log").read_text()
    linear = {"init": "simclr", "mode": "linear", "pretrain_run": str(before), "epochs": 150, "subset": 128,
              "batch_size": 16}  # fmt: skip
    return {
        "pre-train (02)": lambda out: begin_notebook("02_pretrain", PRETRAIN, out),
        "fine-tune (09, scratch)": lambda out: begin_notebook("09_one_experiment", SCRATCH, out),
        "detect (09, linear)": lambda out: begin_notebook("09_one_experiment", linear, out),
        "sweep": lambda out: begin_sweep(SMALL_SWEEP, out),
    }


def ended(process: int) -> int:
    """Wait for a process and return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left(folder: Path) -> dict:
    """Return {file: content} of what a finished run leaves, without times; also which files there are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".npy":
            found[name] = np.load(path).tobytes()
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                found[name] = file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        elif path.name == "metrics.jsonl":
            rows = {(row := json.loads(line))["epoch"]: row for line in path.read_text().splitlines()}
            found[name] = [{k: v for k, v in rows[epoch].items() if k not in TIMES} for epoch in sorted(rows)]
        elif path.name == "results.csv" or path.name == "curves.csv":
            found[name] = files.read_csv(path).drop(columns=TIMES, errors="ignore").to_csv()
        elif path.name != "log.txt":
            found[name] = path.is_dir()
    return found


def epochs(folder: Path) -> int:
    """Return how many records there are below a folder."""
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("metrics.jsonl"))


def rounds(kills: int, folder: Path, names: list[str], seed: int = 0):
    """Kill and run again, `kills` times, the kinds of `names` in turn; yield what became of each in a line."""
    draws = random.Random(seed)
    begin = {name: how for name, how in kinds(folder).items() if name in names}
    whole, took = {}, {}
    for i, (name, start) in enumerate(begin.items()):
        out = folder / f"whole-{i}"
        clock = time.monotonic()
        assert ended(start(out)) == 0, out.with_suffix(".log").read_text()[-2000:]
        whole[name], took[name] = left(out), time.monotonic() - clock
    for number in range(kills):
        name, out = names[number % len(names)], folder / f"killed-{number}"
        process, moment = begin[name](out), draws.uniform(0.05, 0.95) * took[name]
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        ended(process)
        done = epochs(out) if out.exists() else 0
        assert ended(begin[name](out)) == 0, out.with_suffix(".log").read_text()[-2000:]
        after = left(out)
        again = epochs(out) - sum(len(rows) for path, rows in after.items() if path.endswith("metrics.jsonl"))
        same = "yes" if after == whole[name] else "NO"
        yield f"{name:<24} killed after {moment:.1f} s, {done} epochs done, {again} done again, identical: {same}"


QUICK = ["pre-train (02)", "fine-tune (09, scratch)", "detect (09, linear)"]
ALL = [*QUICK, "sweep", *QUICK, *QUICK]  # in turn

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    there = Path(sys.argv[2]).resolve()
    there.mkdir(parents=True)
    number = int(sys.argv[1])
    for line in rounds(number, there, ALL if number > len(QUICK) else QUICK):
        print(line, flush=True)
