"""JupyterLab as `make lab` starts it: for this machine only, and for nobody without the token."""

import re
import socket
import urllib.error
import urllib.request

import pytest
from lab_server import MAKEFILE, flags, serving


def test_make_lab_uses_the_flags_and_nothing_that_opens_a_door():
    [recipe] = re.findall(r"^lab:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    [start] = [line for line in recipe.splitlines() if "jupyter lab" in line]
    assert start.rstrip().endswith("$(BIN)/jupyter lab $(LAB) notebooks")
    assert "--ip=127.0.0.1" in flags() and "--ServerApp.allow_remote_access=False" in flags()
    assert not re.search(r"token|password|allow-root|allow_root|0\.0\.0\.0|--ip=['\"]?[*]|allow_origin='?[*]", recipe)
    assert not [f for f in flags() if re.search("token|password|root|unauthenticated", f)]


@pytest.fixture
def server(tmp_path):
    """Yield what JupyterLab's server, with those flags and on a port of its own, says of itself."""
    with serving(tmp_path, tmp_path) as told:
        yield told


def status(address: str, **headers) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=120) as answer:
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
