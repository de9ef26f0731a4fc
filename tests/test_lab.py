"""JupyterLab as `make lab` starts it: for this machine only, and for nobody without the token."""

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()


def flags() -> list[str]:
    """Return the words that the Makefile starts JupyterLab with."""
    [line] = re.findall(r"^LAB := (.*)$", MAKEFILE, re.MULTILINE)
    return shlex.split(line)


def test_make_lab_uses_the_flags_and_nothing_that_opens_a_door():
    [recipe] = re.findall(r"^lab:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    [start] = [line for line in recipe.splitlines() if "jupyter lab" in line]
    assert start.rstrip().endswith("$(BIN)/jupyter lab $(LAB) notebooks")
    assert "--ip=127.0.0.1" in flags() and "--ServerApp.allow_remote_access=False" in flags()
    assert not re.search(r"token|password|allow-root|allow_root|0\.0\.0\.0|--ip=['\"]?[*]|allow_origin='?[*]", recipe)
    assert not [f for f in flags() if re.search("token|password|root|unauthenticated", f)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Yield what JupyterLab's server, with those flags and on a port of its own, says of itself."""
    for name in ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(tmp_path / name))
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*flags(), f"--port={port}", "--no-browser", "--allow-root", "--ServerApp.port_retries=0"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", *words], cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 240
        while not (files := list((tmp_path / "RUNTIME_DIR").glob("jpserver-*.json"))) and time.monotonic() < end:
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        assert files, (tmp_path / "log").read_text()
        yield json.loads(files[0].read_text())
    finally:
        server.terminate()
        server.wait(30)


def status(address: str, **headers) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_on_this_machine_and_asks_for_the_token(server):
    contents = f"http://127.0.0.1:{server['port']}/api/contents"
    assert server["hostname"] == "127.0.0.1" and len(server["token"]) >= 40 and not server["password"]
    assert status(contents) == 403
    assert status(f"{contents}?token=") == status(f"{contents}?token=guess") == 403
    assert status(contents, Authorization=f"token {server['token']}") == 200
    assert status(contents, Authorization=f"token {server['token']}", Host="evil.example") == 403  # DNS rebinding
    with socket.socket() as other:  # every other address of this machine is closed
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", server["port"])) != 0
