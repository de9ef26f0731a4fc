"""Watching a run: in real kernels, without a browser; what JupyterLab would send is sent by hand."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptglab import live

ROOT = Path(__file__).parents[1]


@pytest.fixture
def client(tmp_path, monkeypatch) -> Iterator:
    """A client of a kernel of its own, at work in a folder of its own."""
    manager = pytest.importorskip("jupyter_client.manager")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    yield client
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


def send(client, code: str, **metadata) -> str:
    """Have `code` executed as a front end would that sends `metadata`; return the message's id."""
    message = client.session.msg("execute_request", {"code": code, "silent": False, "stop_on_error": True},
                                 metadata=metadata)  # fmt: skip
    client.shell_channel.send(message)
    return message["header"]["msg_id"]


def heard(client, until=None, seconds: float = 60) -> list[dict]:
    """Return what the kernel says until it is idle again, or until `until` is true of a message."""
    messages, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        message = client.get_iopub_msg(timeout=seconds)
        messages.append(message)
        idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        if until(message) if until else idle:
            return messages
    raise TimeoutError(f"not heard in {seconds} s: {[m['msg_type'] for m in messages]}")


def said(messages: list[dict]) -> str:
    return "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")


ASKS = "from ptglab import live; print(live.interactive())"


def test_widgets_are_for_a_front_end_that_names_its_cells(client):
    for metadata, expected in [({}, "False"), ({"cellId": "a"}, "True")]:
        send(client, ASKS, **metadata)
        assert said(heard(client)).strip() == expected
    send(client, "import os; os.environ['PTGLAB_STATIC'] = '1'; " + ASKS, cellId="a")
    assert said(heard(client)).strip() == "False"


def test_there_are_no_widgets_without_a_kernel():
    assert live.interactive() is False
