"""Prints and keeps a line `name ours peer ratio` for each comparison."""

from pathlib import Path

import pandas as pd
import pytest

lines = pytest.StashKey[list]()


@pytest.fixture
def report(request):
    """Return a function that takes the figures of one comparison."""
    return request.config.stash.setdefault(lines, []).append


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(lines, [])
    if not found:
        return
    frame = pd.DataFrame(found)
    terminalreporter.write_sep("=", f"ours and the peer in turn, medians in seconds; {frame['device'][0]}")
    terminalreporter.write_line(f"{'name':28} {'ours':>9} {'peer':>9} {'ratio':>7}  (range)        work; peer")
    for row in found:
        terminalreporter.write_line(
            f"{row['name']:28} {row['ours']:9.4f} {row['peer']:9.4f} {row['ratio']:7.2f}  "
            f"({row['lowest_ratio']:.1f} to {row['highest_ratio']:.1f})  {row['work']}; {row['package']}; "
            f"difference {row['difference']:g}"
        )
    folder = Path("runs/bench")
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "speed.csv", index=False)
    terminalreporter.write_line(f"kept in {folder / 'speed.csv'}")
