"""What a sweep shows while it runs: a live table on a terminal, a line a cell elsewhere."""

import math
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ptglab.lab import sweeps as sweep
from ptglab.lab.spec import Cell


def plan(title: str, cells: list[Cell], out: Path, jobs: int) -> None:
    """Print the cells of a sweep, what they share, and how long the unfinished ones will take."""
    console, sharing = Console(), Counter(name for cell in cells for name in cell.needs)
    console.print(f"[bold]{Text(title).markup}[/]: {len(cells):,} executions, "
                  f"{sum(c.finished(out) for c in cells):,} of them finished in {out}")  # fmt: skip
    table = Table(Column("folder", overflow="fold"), "notebook", "shared by", "state", box=None)
    for cell in cells:
        shared = f"{sharing[cell.name]} cells" if cell.name in sharing else ""
        table.add_row(Text(cell.name), Text(cell.notebook), shared, "finished" if cell.finished(out) else "to run")
    console.print(table)
    console.print(f"estimate: {duration(sweep.estimate(cells, out, jobs))} with {jobs} at a time")


def watch(title: str, events: Iterable[sweep.Event], cells: list[Cell], out: Path, jobs: int) -> int:
    """Show `events` as they come, report what failed, and return how many cells did."""
    console, states, began, failed = Console(), {}, {}, []

    def show() -> Table:
        count = Counter(states.values())
        done = count["finished"] + count["skipped"]
        head = (f"{title}: {done:,} of {len(cells):,} done, {count['started']} running, "
                f"{count['failed'] + count['blocked']} failed; "
                f"about {duration(sweep.estimate(cells, out, max(jobs, count['started'])))} left")  # fmt: skip
        table = Table(box=None, show_header=False)
        for name in (name for name, state in states.items() if state == "started"):
            table.add_row(Text(name), duration(time.perf_counter() - began[name]))
        whole = Table.grid()
        for row in (Text(head), ProgressBar(len(cells), done, width=60), table):
            whole.add_row(row)
        return whole

    with Live(get_renderable=show, console=console, refresh_per_second=2, transient=True) as live:
        for event in events:
            name = event.cell.name
            if event.state == "lost":
                print(f"lost {name} {event.error}", flush=True)
                continue
            states[name], began[name] = event.state, time.perf_counter()
            if event.state in ("failed", "blocked"):
                failed.append(event)
            if not console.is_terminal and event.state not in ("started", "skipped"):
                done = sum(state in ("finished", "skipped") for state in states.values())
                took = f"in {event.seconds:.0f} s" if event.seconds else ""
                print(f"{done:>4} of {len(cells)}  {event.state} {name} {took} {event.error}".rstrip(), flush=True)
            live.refresh()
    count = Counter(states.values())
    print(f"{title}: {count['finished']} finished now, {count['skipped']} before, {len(failed)} failed")
    for event in failed:
        where = "" if event.state == "blocked" else f"; see {out / event.cell.name / 'log.txt'}"
        print(f"failed: {event.cell.name} ({event.cell.notebook}): {event.error}{where}")
    return len(failed)


def duration(seconds: float) -> str:
    """Return seconds as a person would say them; "unknown" for NaN."""
    if math.isnan(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
