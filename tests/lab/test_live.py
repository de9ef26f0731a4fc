"""Watching a run: in real kernels, without a browser; what JupyterLab would send is sent by hand."""

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tiny_notebooks import until

from ptglab import stopping
from ptglab.lab import live, runs

ROOT = Path(__file__).parents[2]


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


def idle(message: dict) -> bool:
    return message["content"].get("execution_state") == "idle"


def heard(client, last=idle) -> list[dict]:
    """Return what the kernel says until it is idle again, or until `last` is true of a message."""
    messages = []
    while not messages or not last(messages[-1]):
        messages.append(client.get_iopub_msg(timeout=300))
    return messages


def said(messages: list[dict]) -> str:
    return "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")


ASKS = "from ptglab import live; print(live.interactive())"


def test_widgets_are_for_a_front_end_that_names_its_cells(client):
    for metadata, expected in [({}, "False"), ({"cellId": "a"}, "True")]:
        send(client, ASKS, **metadata)
        assert said(heard(client)).strip() == expected
    send(client, "import os; os.environ['PTGLAB_STATIC'] = '1'; " + ASKS, cellId="a")
    assert said(heard(client)).strip() == "False"


# The last epoch begins when the test says so, or never: then the cell waits until it is interrupted.
WAITS = """
import pathlib, time
from ptglab.lab import runs
run = runs.start("run", epochs=5)
def steps():
    for epoch in range(len(run.records()) + 1, 6):
        while epoch == 4 and not pathlib.Path("gate").exists():
            pathlib.Path("waiting").touch()
            time.sleep(0.02)
        yield {"epoch": epoch, "loss": 1 / epoch}
run.follow(steps(), "pre-train", 5)
"""


def models(messages: list[dict]) -> dict[str, str]:
    """Return {model's name: its comm's id} of the widgets made in `messages`."""
    made = [m["content"] for m in messages if m["msg_type"] == "comm_open"]
    return {m["data"]["state"].get("_model_name"): m["comm_id"] for m in made}


def click(client, comm: str) -> None:
    """Press a button as JupyterLab does: in a subshell of the kernel, for its main shell is busy with the cell."""
    asking = client.session.msg("create_subshell_request", {})
    client.control_channel.send(asking)
    while (reply := client.get_control_msg(timeout=300))["parent_header"].get("msg_id") != asking["header"]["msg_id"]:
        pass
    pressed = {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}
    message = client.session.msg("comm_msg", pressed)
    message["header"]["subshell_id"] = reply["content"]["subshell_id"]
    client.shell_channel.send(message)


def curves(messages: list[dict]) -> list[str]:
    pages = [m["content"]["data"].get("text/html", "") for m in messages if m["msg_type"] == "update_display_data"]
    return [page for page in pages if "<img" in page]


def ended(client, asked: str) -> list[dict]:
    """Return what the kernel says until it has done what was asked in that message; a subshell is idle earlier."""
    return heard(client, lambda message: message["parent_header"].get("msg_id") == asked and idle(message))


@pytest.mark.parametrize("how", ["button", "interrupt"])
def test_a_run_is_stopped_by_its_button_or_an_interrupt_and_the_cell_goes_on(client, tmp_path, how):
    """The button's click is heard while the cell runs; an interrupt is JupyterLab's own, a SIGINT to the kernel."""
    run = runs.Run(tmp_path / "run")
    for _ in range(2):  # the second time it waits at once, before it shows any curves
        (tmp_path / "waiting").unlink(missing_ok=True)
        asked = send(client, WAITS, cellId="a")
        first = heard(client, lambda message: "ButtonModel" in models([message]))
        until((tmp_path / "waiting").exists)
        if how == "button":
            click(client, models(first)["ButtonModel"])
        else:
            client.parent.interrupt_kernel()
        rest = ended(client, asked)
        errors = [m["content"] for m in rest if m["msg_type"] == "error"]
        assert [(e["ename"], e["traceback"]) for e in errors] == [("Stopped", [stopping.LINE])]
        assert curves(rest) and not said(first + rest)
        assert run.records()["epoch"].tolist() == [1, 2, 3] and not run.done
    (tmp_path / "gate").touch()
    assert not [m for m in ended(client, send(client, WAITS, cellId="a")) if m["msg_type"] == "error"]
    assert [json.loads(line)["epoch"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_without_a_front_end_the_same_cell_prints_plain_text(client, tmp_path):
    (tmp_path / "gate").touch()
    send(client, WAITS)
    messages = heard(client)
    assert "pre-train: 100%" in said(messages) and "5/5" in said(messages)
    assert {m["msg_type"] for m in messages} == {"status", "execute_input", "stream"}


RECORDS = [{"epoch": e, "loss": 1 / e, "knn_accuracy": 0.1 * e, "seconds": 1.0} for e in (1, 2, 3)]


def test_a_picture_says_what_it_shows_and_grows():
    pages = [live.picture("pre-train <simclr>", 9, RECORDS[:n]) for n in (1, 2, 3)]
    assert len(set(pages)) == 3
    assert 'alt="Curves: pre-train &lt;simclr&gt;: epoch 3 of 9, loss 0.3333, knn accuracy 30.0 %"' in pages[-1]
    png = base64.b64decode(re.search(r"base64,([^\"]+)", pages[-1])[1])
    assert Image.open(io.BytesIO(png)).size == (1056, 286)


def test_a_value_that_some_records_lack_is_left_out_of_its_curve():
    records = [RECORDS[0] | {"knn_accuracy": math.nan}, *RECORDS[1:]]
    assert live.picture("a", 3, records) == live.picture("a", 3, [{"epoch": 1, "loss": 1.0}, *RECORDS[1:]])
