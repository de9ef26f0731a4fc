"""Runs that are killed at random moments and run again leave what undisturbed ones do; see kill_harness."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "helpers" / "kill_harness.py"


def table(kills: int, folder: Path, seconds: int) -> list[str]:
    """Return the lines of the harness, which runs in a process of its own: it forks."""
    command = [sys.executable, str(HARNESS), str(kills), str(folder / "kills")]
    environment = os.environ | {"PYTHONPATH": str(HARNESS.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout.splitlines()[-kills:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.soak)])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, kills):
    rows = table(kills, tmp_path, 1200 if kills < 4 else 7200)
    assert len(rows) == kills and all(row.endswith("identical: yes") for row in rows), "\n".join(rows)
