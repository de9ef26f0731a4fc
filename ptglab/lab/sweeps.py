"""A grid of papermill runs: shared stages once, finished cells skipped, interrupted ones gone on with."""

import csv
import math
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ptglab import files
from ptglab.errors import InputError
from ptglab.lab import cluster
from ptglab.lab.spec import Cell

TABLES = ("results.csv", "curves.csv")  # what is gathered from the cells, where they leave it
GATHER_EVERY = 10  # seconds at least between two gatherings


@dataclass(frozen=True)
class Event:
    """What became of a cell: skipped, started (`where`), lost with its worker, finished, failed, or blocked by a stage
    that failed."""

    cell: Cell
    state: str
    seconds: float = 0.0
    error: str = ""
    where: str = ""


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


def run(
    cells: list[Cell], out: str | Path, jobs: int = 1, dask: str = "", gathered: list[Cell] | None = None
) -> Iterator[Event]:
    """Execute the unfinished `cells` below `out`, each in a process and a kernel of its own: `jobs` at a time on this
    machine, or on the Dask cluster whose scheduler is at `dask`.

    Yields an Event whenever something became of a cell. `out` then holds a folder a cell, `results.csv` (and what else
    TABLES names) gathered from them, or from `gathered`, `cells.csv`, which says how long each took, and `log.txt`. A
    cell that failed leaves the others alone; one whose worker was lost is begun again by another. Raises InputError if
    another sweep is at work in `out`, or if the cluster cannot be had.
    """
    out, gathered, latest = Path(out).resolve(), cells if gathered is None else gathered, -math.inf
    with _alone(out):
        waiting = []
        for cell in cells:
            if cell.finished(out):
                yield Event(cell, "skipped")
            else:
                waiting.append(cell)
        try:
            for event in _dispatch(waiting, out, jobs, dask) if waiting else []:
                _log(out, event)
                if event.state == "finished":
                    _note(out, event)
                    if time.monotonic() - latest > GATHER_EVERY:
                        gather(gathered, out)
                        latest = time.monotonic()
                yield event
        finally:
            gather(gathered, out)


def _dispatch(waiting: list[Cell], out: Path, jobs: int, dask: str) -> Iterator[Event]:
    """Hand all of `waiting` to Dask, which knows what needs what, and yield what it says of them."""
    with cluster.connect(dask, jobs, out) as (client, site):
        news, futures, stages, begun = queue.SimpleQueue(), {}, {}, {}
        client.subscribe_topic(site.token, news.put)
        for cell in waiting:
            stages[cell.name] = future = cluster.submit(client, cell, site, stages)
            futures[future.key] = cell, future
            future.add_done_callback(news.put)
        del stages, future
        try:
            while futures:
                new = news.get()
                if isinstance(new, tuple):  # when, and which cell a worker has begun
                    name, where = new[1]["cell"], new[1]["where"]
                    cell = next((cell for cell, _ in futures.values() if cell.name == name), None)
                    if cell and begun.setdefault(name, []):
                        yield Event(cell, "lost", error=f"with worker {begun[name][-1]}; begun again by {where}")
                    if cell:
                        begun[name].append(where)
                        yield Event(cell, "started", where=where)
                elif event := _outcome(futures[new.key][0], new, site, begun, client):
                    del futures[new.key]
                    yield event
                else:
                    new.add_done_callback(news.put)
        finally:
            with suppress(Exception):  # the scheduler may be gone
                client.cancel([future for _, future in futures.values()])


def _outcome(cell: Cell, future, site: cluster.Site, begun: dict[str, list[str]], client) -> Event | None:
    """Return what became of a cell; None if it is tried again."""
    from distributed import KilledWorker

    if future.cancelled():
        raise InputError(f"the Dask scheduler has gone, or was told to forget the sweep; {files.GO_ON}")
    try:
        error = future.exception(timeout="5s")
    except TimeoutError:  # tried again meanwhile, with another that needs it or that it needs
        return None
    try:
        if error is None:
            result = future.result()
            if result.archive is not None:
                cluster.unpack(result.archive, site.out / cell.name)
            return Event(cell, "finished", result.seconds)
        blamed, reason = cell.name, f"{type(error).__name__}: {error}"
        if isinstance(error, KilledWorker):  # Dask also counts workers that had only been meant to run it
            blamed = error.task.removesuffix(f" {site.token}")
            if len(begun.get(blamed, [])) <= cluster.LOSSES:
                client.retry([future])
                return None
            reason = f"{len(begun[blamed])} workers were lost that ran it, as by too little memory"
        elif isinstance(error, cluster.Failed):
            blamed, reason = error.cell, error.reason
            if error.archive is not None and blamed == cell.name:
                cluster.unpack(error.archive, site.out / cell.name)
    except InputError as refusal:
        blamed, reason = cell.name, str(refusal)
    if blamed != cell.name:
        return Event(cell, "blocked", error=f"{blamed} failed")
    return Event(cell, "failed", error=reason)


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


def _log(out: Path, event: Event) -> None:
    """Append a line to `log.txt`."""
    with open(out / "log.txt", "a") as file:
        words = time.strftime("%Y-%m-%d %H:%M:%S"), event.state, event.cell.name, event.where, event.error
        print(*filter(None, words), file=file)


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
