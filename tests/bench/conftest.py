"""Prints and keeps a line `name ours peer ratio` for each comparison."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from ptglab import figures

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
    draw(frame, folder / "speed.png")
    terminalreporter.write_line(f"kept in {folder / 'speed.csv'}, drawn in {folder / 'speed.png'}")


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw the ratios of `speed.csv`."""
    figures.style()
    figure = Figure(figsize=(9, 4.2))
    ax = figure.add_subplot()
    ranges = frame[["ratio", "lowest_ratio", "highest_ratio"]].to_numpy().T
    figures.ratios(ax, list(frame["work"] + " / " + frame["package"]), *ranges)
    ax.set_title("How many times faster than the peer, on the same work", loc="left")
    figures.caption(figure, on=frame["device"][0], torch=frame["torch_version"][0], commit=frame["commit"][0])
    figure.savefig(path, dpi=150, bbox_inches="tight")
