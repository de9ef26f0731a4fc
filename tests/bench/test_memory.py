"""Memory of every command on the embedded digits: `python -m pytest -m bench tests/bench/test_memory.py`."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

GB = 1e9
CEILINGS = {  # of the resident memory of a command and all its processes together
    "doctor": (1.5 * GB, ["doctor"]),
    "audit": (3 * GB, ["audit", "digits", "--out", "audit"]),
    "run": (3 * GB, ["run", "02_pretrain", "02.ipynb", "-p", "data_run=", "-p", "epochs=3"]),
    "sweep": (4 * GB, ["sweep", "smoke", "--out", "sweep", "--jobs", "1"]),
    "demo": (3 * GB, ["demo", "--out", "demo"]),
}


def peak_of(command: list[str], folder: Path) -> float:
    """Run `ptglab` with arguments in `folder`; return the largest sum of resident bytes of it and all its children."""
    ptglab = Path(sys.executable).with_name("ptglab")
    process, peak = subprocess.Popen([ptglab, *command], cwd=folder, stdout=subprocess.DEVNULL), 0.0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
        time.sleep(0.05)  # a sample of memory, not a wait for an event
    assert process.returncode == 0
    return peak


@pytest.mark.bench
@pytest.mark.parametrize("name", CEILINGS)
def test_commands_stay_below_their_ceilings(name, tmp_path, capsys):
    most, command = CEILINGS[name]
    peak = peak_of(command, tmp_path)
    with capsys.disabled():
        print(f"\nptglab {name}: {peak / GB:.2f} GB at the peak, {most / GB:.1f} GB allowed")
    assert peak < most
