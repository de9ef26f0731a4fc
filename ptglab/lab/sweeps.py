"""Sweeps: a grid of notebook executions on this machine, or on a Dask cluster; shared stages once, resumable.

On a cluster, every worker must see the sweep's folder (a shared file system) and run the same ptglab. A cluster trusts
its members: whoever reaches its scheduler can run programs on all of its workers and on the machine of the sweep. Keep
it on a network of your own, or give it TLS (Dask's `distributed.comm`). notebooks/README.md says how, also on SLURM.
"""

import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ptglab import __version__, files
from ptglab.errors import InputError
from ptglab.lab.notebooks import PARENT_ON_STDIN
from ptglab.lab.spec import MARK, TABLES, Cell, left
from ptglab.text import printable

GATHER_EVERY = 10  # seconds at least between two gatherings
RETRIES = 3  # of a cell whose worker failed, not of one that failed itself
VERSIONS = ("torch", "torchvision", "numpy", "scikit-learn")  # on which results depend to the last bit


@dataclass(frozen=True)
class Event:
    """What became of a cell: skipped, started, finished (`where`), failed, or blocked by a stage that failed.

    Before all, a cell that had finished is to run `again` if what it left is no longer there as it was.

    On a cluster, a cell has started once it is handed over, and a lost worker's cell is started again there.
    """

    cell: Cell
    state: str
    seconds: float = 0.0
    error: str = ""
    where: str = ""


def estimate(cells: list[Cell], out: Path, jobs: int) -> float:
    """Return the seconds that the unfinished `cells` will take.

    Each takes as long as those of its notebook took in `out` or, where none has finished, as its spec says; NaN if
    neither is known.
    """
    took = {}
    with suppress(OSError, ValueError, KeyError):
        table = files.read_csv(out / "cells.csv")
        took = pd.to_numeric(table["seconds"], errors="coerce").groupby(table["notebook"]).mean()
    return sum(took.get(c.notebook, c.seconds or math.nan) for c in cells if not c.finished(out)) / jobs


def run(
    cells: list[Cell], out: str | Path, jobs: int = 1, dask: str = "", gathered: list[Cell] | None = None
) -> Iterator[Event]:
    """Execute the unfinished `cells` below `out`, each in a process and a kernel of its own: `jobs` at a time on this
    machine, or on the Dask cluster whose scheduler is at the address, or in the file, `dask`.

    Yields an Event whenever something becomes of a cell. `out` then holds a folder a cell, `results.csv` (and the other
    TABLES) gathered from them, or from `gathered`, `cells.csv`, which says how long each took, and `log.txt`. A failed
    cell leaves the others alone. Raises InputError if another sweep is at work in `out`, or if the cluster fails.
    """
    out, gathered, latest = Path(os.path.realpath(out)), cells if gathered is None else gathered, -math.inf
    with files.writing(out, every=True):
        out.mkdir(parents=True, exist_ok=True)
    files.check_plain(out)
    with files.lock(out, "sweep"):
        for cell in cells:
            if cell.finished(out):
                yield Event(cell, "skipped")
            elif (out / cell.name / "notebook.ipynb").exists():
                why = f"its notebook or a table is missing, empty or changed, or {MARK} is: it runs again"
                yield Event(cell, "again", error=why)
        waiting = {cell.name: cell for cell in cells if not cell.finished(out)}
        try:
            for event in _dispatch(waiting, out, jobs, dask) if waiting else ():
                _note(out, event)
                if event.state == "finished" and time.monotonic() - latest > GATHER_EVERY:
                    gather(gathered, out)
                    latest = time.monotonic()
                yield event
        finally:
            gather(gathered, out)


def _dispatch(waiting: dict[str, Cell], out: Path, jobs: int, dask: str) -> Iterator[Event]:
    """Start every cell once those it needs have finished, and yield what becomes of it."""
    running, failed = {}, set()
    with _cluster(dask, out) if dask else _machine(jobs, out) as start:
        while waiting or running:
            unfinished = waiting.keys() | {cell.name for cell in running.values()}
            for cell in list(waiting.values()):
                if broken := failed.intersection(cell.needs):
                    failed.add(cell.name)
                    yield Event(waiting.pop(cell.name), "blocked", error=f"{min(broken)} failed")
                elif unfinished.isdisjoint(cell.needs) and (dask or len(running) < jobs):
                    own = Path(cell.notebook).suffix == ".ipynb"  # ours go by their names, wherever they lie
                    placed = replace(cell, notebook=str(Path(cell.notebook).resolve())) if own else cell
                    running[start(placed)] = waiting.pop(cell.name)
                    yield Event(cell, "started")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    seconds, error, where = future.result()
                except CancelledError:
                    raise InputError(f"the Dask scheduler is gone, or has forgotten the sweep; {files.GO_ON}") from None
                except Exception as lost:  # also Dask's, of workers that were lost several times
                    seconds, error, where = 0.0, " ".join(f"{type(lost).__name__}: {lost}".split())[:300], ""
                failed |= {cell.name} if error else set()
                yield Event(cell, "failed" if error else "finished", seconds, error, where)


@contextmanager
def _machine(jobs: int, out: Path) -> Iterator[Callable[[Cell], Future]]:
    """Yield a function that starts a cell on this machine; at the end, what still runs is stopped."""
    stopped = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield lambda cell: pool.submit(execute, cell, out, jobs, stopped.is_set)
        finally:
            stopped.set()


def execute(cell: Cell, out: Path, jobs: int, stopped: Callable[[], bool]) -> tuple[float, str, str]:
    """Execute a cell in its folder and return how long it took, what is wrong if it failed, and the machine's name.

    The process has one part in `jobs` of this machine's threads, ends with this one, and is stopped if `stopped()`.
    """
    from ptglab.train import engine

    folder, began, where = out / cell.name, time.perf_counter(), f"process {os.getpid()} on {socket.gethostname()}"
    if cell.finished(out):  # its result was lost with a worker
        return 0.0, "", where
    folder.mkdir(parents=True, exist_ok=True)
    values = {n: str(out / v) if v in cell.needs else v for n, v in cell.parameters.items()} | {"run_dir": str(folder)}
    given = [word for name, value in values.items() for word in ("-p", f"{name}={value}")]
    command = [sys.executable, "-P", "-m", "ptglab", "run", cell.notebook, str(folder / "notebook.ipynb"), *given]
    threads = str(max(1, engine.threads() // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads, PARENT_ON_STDIN: "1", "PYTHONSAFEPATH": "1"}
    (folder / MARK).unlink(missing_ok=True)
    with open(folder / "log.txt", "a+", encoding="utf-8", errors="replace", opener=files.own) as log:
        print(f"begun {time.strftime('%Y-%m-%d %H:%M:%S')} by {where}", file=log, flush=True)
        start = log.tell()
        try:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=log,
                                       stderr=subprocess.STDOUT)  # fmt: skip
        except (OSError, ValueError) as error:  # too long a value, or one that no command can hold
            return 0.0, f"cannot be started: {error}", where
        with process:
            while process.poll() is None:
                if stopped():
                    process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        log.seek(start)
        lines = [line.strip().removeprefix("ptglab: ") for line in log.readlines() if line.strip()]
    if process.returncode:
        return 0.0, lines[-1] if lines else f"ended with status {process.returncode}", where
    (folder / "failed-notebook.ipynb").unlink(missing_ok=True)
    try:
        made = left(folder)
        for table in made.keys() & set(TABLES):
            files.read_csv(folder / table)
    except InputError as error:
        return 0.0, str(error), where
    files.write_json(folder / MARK, made)
    return time.perf_counter() - began, "", where


@contextmanager
def _cluster(address: str, out: Path) -> Iterator[Callable[[Cell], Future]]:
    """Yield what starts a cell on the Dask cluster at `address`. Raises InputError unless it fits; see above."""
    try:
        import distributed
    except ModuleNotFoundError:
        raise InputError("Dask is not installed, which runs sweeps on clusters: pip install 'ptglab[lab]'") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # the sweep says what concerns a person
    try:
        file = {"scheduler_file": address} if os.path.isfile(address) else {"address": address}
        client = distributed.Client(**file, timeout="10s", set_as_default=False)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:  # Dask's, of what it was given
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"no Dask scheduler answers at {address}: {said}") from None
    pool = None
    try:
        here = about(out)
        try:
            if not client.scheduler_info()["workers"]:
                print(f"no worker at {address} yet: waiting for one", file=sys.stderr)
                client.wait_for_workers(1)
            found = client.run(about, out).values()
        except Exception as error:
            raise InputError(f"the workers at {address} cannot run ptglab {here['ptglab']}, install the same there: "
                             f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None  # fmt: skip
        for there in found:
            if misfit := _misfit(here, there):
                raise InputError(misfit)
            if other := [f"{name} {there[name]}" for name in VERSIONS if there[name] != here[name]]:
                print(f"worker {there['host']} runs {', '.join(other)}: results may differ in the last digits",
                      file=sys.stderr)  # fmt: skip
        pool = client.get_executor(pure=False, retries=RETRIES)
        gpu = any("GPU" in there["resources"] for there in found)
        root = os.environ.get("PTGLAB_DATA", "")

        def start(cell: Cell):
            resources = {"GPU": 1} if gpu and cell.parameters.get("device") != "cpu" else None
            return pool.submit(_on_worker, cell, out, here, root, resources=resources)

        yield start
    finally:
        with suppress(Exception):  # the scheduler may be gone
            if pool:
                pool.shutdown(wait=False)
            client.close()


def about(out: Path, dask_worker=None) -> dict:
    """Return what decides whether this process can run the cells of a sweep in `out`: versions, and what it sees.

    Dask's `Client.run` passes the worker.
    """
    from ptglab.lab import runs

    lock = out / ".lock.txt"
    return runs.environment() | {
        "ptglab": f"{__version__} {runs.commit()}".strip(),
        "host": socket.gethostname(),
        "sees": files.read(lock, 1000).decode(errors="replace") if lock.exists() else "",
        "resources": list(dask_worker.state.total_resources) if dask_worker else [],
        "out": str(out),
    }


def _misfit(here: dict, there: dict) -> str:
    """Return why a worker cannot run cells, in a line; empty if it can."""
    if there["ptglab"] != here["ptglab"]:
        return f"worker {there['host']} runs ptglab {there['ptglab']}, this is {here['ptglab']}: install the same there"
    if there["sees"] != here["sees"]:
        return f"worker {there['host']} does not see {here['out']}: a sweep on a cluster needs a shared file system"
    return ""


def _on_worker(cell: Cell, out: Path, here: dict, root: str) -> tuple[float, str, str]:
    """Execute a cell on the Dask worker that this is, until nobody waits for it any more."""
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    if misfit := _misfit(here, about(out)):
        return 0.0, misfit, worker.address
    if root:
        os.environ.setdefault("PTGLAB_DATA", root)

    def stopped() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state != "executing"

    return execute(cell, out, worker.state.nthreads, stopped)


def gather(cells: list[Cell], out: Path) -> None:
    """Write TABLES into `out` from those of the finished `cells`, in the order of the plan."""
    for table in TABLES:
        paths = [out / cell.name / table for cell in cells if cell.finished(out)]
        if frames := [frame for path in paths if path.exists() and len(frame := files.read_csv(path))]:
            columns = list(dict.fromkeys(column for frame in frames for column in frame))
            whole = pd.concat([frame.dropna(axis=1, how="all") for frame in frames], ignore_index=True)
            files.write_csv(out / table, whole.reindex(columns=columns))


def _note(out: Path, event: Event) -> None:
    """Append a line to `log.txt`, and to `cells.csv` if the cell has finished."""
    with open(out / "log.txt", "a", encoding="utf-8", errors="backslashreplace", opener=files.own) as file:
        words = time.strftime("%Y-%m-%d %H:%M:%S"), event.state, event.cell.name, event.where, event.error
        print(*(printable(word) for word in words if word), file=file)
    if event.state == "finished":
        rows = [{"cell": event.cell.name, "notebook": event.cell.notebook, "seconds": round(event.seconds, 1)}]
        before = []
        with suppress(OSError, ValueError, KeyError):  # what cannot be read begins anew: it serves estimates alone
            before = files.read_csv(out / "cells.csv")[list(rows[0])].to_dict("records")
        files.write_csv(out / "cells.csv", pd.DataFrame([*before, *rows]))
