"""A grid of papermill runs: shared stages once, finished cells skipped, interrupted ones gone on with."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ptglab import data, engine, execution, files
from ptglab.errors import InputError
from ptglab.spec import Cell

TABLES = ("results.csv", "curves.csv")  # what is gathered from the cells, where they leave it
GATHER_EVERY = 10  # seconds at least between two gatherings
# A cell dies with the sweep, which may be killed: otherwise it would go on beside the same cell of the next sweep.
BOOT = """
import ctypes, json, os, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: None)(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]): sys.exit(1)
from pathlib import Path
from ptglab import stopping
from ptglab.errors import InputError
from ptglab.execution import execute
stopping.catch()
try:
    execute(sys.argv[2], Path("notebook.ipynb"), json.loads(sys.argv[3]))
except InputError as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print(stopping.LINE, file=sys.stderr)
    sys.exit(stopping.STATUS)
"""


@dataclass(frozen=True)
class Event:
    """What became of a cell: skipped, started, finished, failed, or blocked by a stage that failed."""

    cell: Cell
    state: str
    seconds: float = 0.0
    error: str = ""


def estimate(cells: list[Cell], out: Path, jobs: int) -> float:
    """Return the seconds that the unfinished `cells` will take.

    Each as long as those of its notebook took in `out`, or, where none has finished, as its spec says; NaN if neither
    is known.
    """
    took = {}
    for row in _journal(out):
        took.setdefault(row["notebook"], []).append(float(row["seconds"]))
    left = [c for c in cells if not c.finished(out)]
    mean = {name: sum(seconds) / len(seconds) for name, seconds in took.items()}
    expected = [mean.get(c.notebook) or c.seconds or math.nan for c in left]
    return sum(expected) / jobs


def run(cells: list[Cell], out: str | Path, jobs: int = 1, gathered: list[Cell] | None = None) -> Iterator[Event]:
    """Execute the unfinished `cells` below `out`, `jobs` at a time, each in a process and a kernel of its own.

    Yields an Event whenever something became of a cell. `out` then holds a folder a cell, `results.csv` (and what else
    TABLES names) gathered from them, or from `gathered`, and
    `cells.csv`, which says how long each took. A cell that failed leaves
    the others alone. Raises InputError if another sweep is at work in `out`.
    """
    out = Path(out).resolve()
    with _alone(out), ThreadPoolExecutor(jobs) as pool:
        processes: dict[str, subprocess.Popen] = {}
        waiting, running, broken, latest = [], {}, set(), -math.inf
        gathered = cells if gathered is None else gathered
        for cell in cells:
            if cell.finished(out):
                yield Event(cell, "skipped")
            else:
                waiting.append(cell)
        open_stages = {cell.name for cell in waiting}
        try:
            while waiting or running:
                for cell in [c for c in waiting if broken.intersection(c.needs)]:
                    waiting.remove(cell)
                    broken.add(cell.name)
                    yield Event(cell, "blocked", error=f"{next(n for n in cell.needs if n in broken)} failed")
                ready = [c for c in waiting if not open_stages.intersection(c.needs)]
                for cell in ready[: jobs - len(running)]:
                    waiting.remove(cell)
                    running[pool.submit(execute, cell, out, jobs, processes)] = cell, time.perf_counter()
                    yield Event(cell, "started")
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    cell, began = running.pop(future)
                    open_stages.discard(cell.name)
                    event = _outcome(cell, future, time.perf_counter() - began)
                    if event.state == "failed":
                        broken.add(cell.name)
                    else:
                        _note(out, event)
                        if time.monotonic() - latest > GATHER_EVERY:
                            gather(gathered, out)
                            latest = time.monotonic()
                    yield event
        finally:
            for process in list(processes.values()):
                process.terminate()
            gather(gathered, out)


def execute(cell: Cell, out: Path, jobs: int, processes: dict[str, subprocess.Popen]) -> str:
    """Execute a cell in its folder; return the last line of its error, or nothing.

    It runs in a process of its own, which is in `processes` meanwhile, with its share of the threads of `jobs`.
    """
    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    values = {n: str(out / v) if v in cell.needs else v for n, v in cell.parameters.items()} | {"run_dir": str(folder)}
    notebook = str(execution.notebook_path(cell.notebook).resolve())
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, engine.threads() // jobs))}
    with suppress(InputError, OSError):
        environment["PTGLAB_DATA"] = str(data.root().resolve(strict=True))
    command = [sys.executable, "-c", BOOT, str(os.getpid()), notebook, json.dumps(values)]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes[cell.name] = process
        status = process.wait()
        del processes[cell.name]
    if status == 0:
        (folder / "failed-notebook.ipynb").unlink(missing_ok=True)
        return ""
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {status}"


def gather(cells: list[Cell], out: Path) -> None:
    """Write TABLES into `out` from those of the finished `cells`, in the order of the plan."""
    for table in TABLES:
        paths = [out / cell.name / table for cell in cells if cell.finished(out)]
        frames = [pd.read_csv(path, dtype={"commit": str}) for path in paths if path.exists()]
        if frames:
            whole = pd.concat([frame.dropna(axis=1, how="all") for frame in frames], ignore_index=True)
            columns = list(dict.fromkeys(column for frame in frames for column in frame))
            whole = whole.reindex(columns=columns)
            files.write(out / table, lambda path, whole=whole: whole.to_csv(path, index=False))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder; the system lets go of it when the process ends, however that comes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    with files.lock(out, "sweep"):
        yield


def _outcome(cell: Cell, future: Future, seconds: float) -> Event:
    error = future.result()
    return Event(cell, "failed" if error else "finished", seconds, error)


def _note(out: Path, event: Event) -> None:
    """Append a line to `cells.csv`."""
    new = not (out / "cells.csv").exists()
    with open(out / "cells.csv", "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["cell", "notebook", "seconds"])
        writer.writerow([event.cell.name, event.cell.notebook, f"{event.seconds:.1f}"])


def _journal(out: Path) -> list[dict]:
    """Return the whole lines of `cells.csv`."""
    with suppress(FileNotFoundError), open(out / "cells.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["seconds"]]
    return []
