"""Notebooks that tests write and run, and how they wait for what other processes do."""

import json
import time
from pathlib import Path


def write_notebook(path: Path, parameters: str, *bodies: str) -> str:
    """Write a notebook with a cell of parameters and one for each body; return its path as a text."""

    def cell(number: int, source: str, tags=()) -> dict:
        return {"cell_type": "code", "id": f"c{number}", "metadata": {"tags": list(tags)}, "source": source,
                "outputs": [], "execution_count": None}  # fmt: skip

    cells = [cell(0, parameters, ["parameters"]), *(cell(i, body) for i, body in enumerate(bodies, 1))]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return str(path)


def until(condition, seconds: float = 300):
    """Return what `condition` returns once that is true; the limit only guards against hanging."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return found


def gone(pid: int) -> bool:
    """Return whether a process has ended; Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
