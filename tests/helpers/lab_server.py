"""JupyterLab as `make lab` starts it, on a port of its own."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()


def flags() -> list[str]:
    """Return the words that the Makefile starts JupyterLab with."""
    [line] = re.findall(r"^LAB := (.*)$", MAKEFILE, re.MULTILINE)
    return shlex.split(line)


@contextlib.contextmanager
def serving(folder: Path, settings: Path, *words: str, app: str = "jupyter_server") -> Iterator[dict]:
    """Serve `folder` and yield what the server says of itself: port, token and more; `settings` keeps its files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {f"JUPYTER_{name}": str(settings / name) for name in ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")}
    environment = {k: v for k, v in os.environ.items() if k != "JUPYTER_TOKEN"} | names
    words = [*flags(), *words, f"--port={port}", "--no-browser", "--allow-root", "--ServerApp.port_retries=0"]
    with open(settings / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", app, *words], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 240
        while not (found := list((settings / "RUNTIME_DIR").glob("jpserver-*.json"))) and time.monotonic() < end:
            assert server.poll() is None, (settings / "log").read_text()
            time.sleep(0.2)
        assert found, (settings / "log").read_text()
        yield json.loads(found[0].read_text())
    finally:
        server.kill()  # its kernels see that and end
        server.wait()
