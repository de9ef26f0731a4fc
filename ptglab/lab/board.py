"""What a sweep shows while it runs: a line a cell, and a progress bar on a terminal."""

import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from ptglab.lab import sweeps
from ptglab.lab.spec import Cell
from ptglab.text import printable


def plan(title: str, cells: list[Cell], out: Path, jobs: int) -> None:
    """Print the cells of a sweep, what they share, and how long the unfinished ones will take."""
    sharing = Counter(name for cell in cells for name in cell.needs)
    finished = sum(cell.finished(out) for cell in cells)
    print(printable(f"{title}: {len(cells):,} executions, {finished:,} of them finished in {out}"))
    for cell in cells:
        shared = f", shared by {sharing[cell.name]} cells" if cell.name in sharing else ""
        print(f"  {cell.name}  {printable(cell.notebook)}, {'finished' if cell.finished(out) else 'to run'}{shared}")
    print(f"estimate: {duration(sweeps.estimate(cells, out, jobs))} with {jobs} at a time")


def watch(title: str, events: Iterable[sweeps.Event], cells: list[Cell], out: Path, jobs: int) -> int:
    """Show `events` as they come, report what failed, and return how many cells did."""
    count, failed, title = Counter(), [], printable(title)
    with tqdm(total=len(cells), desc=title, unit=" cells", disable=not sys.stderr.isatty()) as bar:
        for event in events:
            count[event.state] += 1
            if event.state in ("failed", "blocked"):
                failed.append(event)
            if event.state not in ("started", "skipped"):
                took = f"in {event.seconds:.0f} s" if event.seconds else ""
                words = f"{event.state} {event.cell.name} {took} {printable(event.error)}"
                bar.write(words.rstrip(), file=sys.stdout)
                sys.stdout.flush()
            bar.update(event.state not in ("started", "again"))
            bar.set_postfix_str(f"{duration(sweeps.estimate(cells, out, jobs))} left")
    print(f"{title}: {count['finished']} finished now, {count['skipped']} before, {len(failed)} failed")
    for event in failed:
        where = "" if event.state == "blocked" else f"; see {out / event.cell.name / 'log.txt'}"
        print(printable(f"failed: {event.cell.name} ({event.cell.notebook}): {event.error}{where}"))
    return len(failed)


def duration(seconds: float) -> str:
    """Return seconds as a person would say them; "unknown" for NaN."""
    if math.isnan(seconds):
        return "unknown"
    hours, minutes, rest = round(seconds) // 3600, round(seconds) // 60 % 60, round(seconds) % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
