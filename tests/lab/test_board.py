"""What a sweep says while it runs, off a terminal."""

import math
from pathlib import Path

import pytest

from ptglab.lab import board
from ptglab.lab.spec import Cell
from ptglab.lab.sweeps import Event

CELLS = [Cell(f"cells/{name}", "09_one_experiment", {}, needs, 60.0) for name, needs in
         (("stage", ()), ("one", ("cells/stage",)), ("two[red]", ("cells/stage",)))]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (7260, "2 h 1 min"), (math.nan, "unknown")],
)
def test_durations(seconds, said):
    assert board.duration(seconds) == said


def test_a_plan_names_every_folder_what_is_shared_and_the_time(tmp_path, capsys):
    (tmp_path / "cells" / "one").mkdir(parents=True)
    (tmp_path / "cells" / "one" / "notebook.ipynb").write_text("{}")
    board.plan("A [b]title", CELLS, tmp_path, 2)
    said = capsys.readouterr().out
    for words in (
        "A [b]title",
        "cells/two[red]",
        "2 cells",
        "finished",
        "to run",
        "estimate: 1 min 0 s with 2 at a time",
    ):
        assert words in said, words


def test_every_end_of_a_cell_is_a_line_and_failures_are_told_again(capsys):
    events = [Event(CELLS[0], "skipped"), Event(CELLS[1], "started"), Event(CELLS[2], "started"),
              Event(CELLS[1], "lost", error="with worker A; begun again by B"), Event(CELLS[1], "started", where="B"),
              Event(CELLS[1], "finished", 12.4), Event(CELLS[2], "failed", 3.0, "ValueError: no")]  # fmt: skip
    assert board.watch("t", events, CELLS, Path("out"), 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "   2 of 3  finished cells/one in 12 s" in lines
    assert "lost cells/one with worker A; begun again by B" in lines
    assert any("failed cells/two[red] in 3 s ValueError: no" in line for line in lines)
    assert "t: 1 finished now, 1 before, 1 failed" in lines
    assert "failed: cells/two[red] (09_one_experiment): ValueError: no; see out/cells/two[red]/log.txt" in lines
