"""Watching a run: in real kernels, without a browser; what JupyterLab would send is sent by hand."""

import base64
import io
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ptglab import stopping
from ptglab.lab import live, runs
from ptglab.train import checkpoints

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


TRAINS = """
from ptglab.train import backbones
from ptglab import data
from ptglab.train import pretrain
from ptglab.lab import runs
images = data.load("digits").images[:64]
run = runs.start("run", epochs=400)
network = backbones.build("resnet18", 2, images, 0)
steps = pretrain.train(network, images, "simclr", epochs=400, batch_size=64, projection=8, checkpoint=run.checkpoint)
run.follow(steps, "pre-train", 400)
"""


def models(messages: list[dict]) -> dict[str, str]:
    """Return {model's name: its comm's id} of the widgets made in `messages`."""
    made = [m["content"] for m in messages if m["msg_type"] == "comm_open"]
    return {m["data"]["state"].get("_model_name"): m["comm_id"] for m in made}


def click(client, comm: str) -> None:
    """Press a button as JupyterLab does: in a subshell of the kernel, for its main shell is busy with the cell."""
    asking = client.session.msg("create_subshell_request", {})
    client.control_channel.send(asking)
    while (reply := client.get_control_msg(timeout=30))["parent_header"].get("msg_id") != asking["header"]["msg_id"]:
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

    def over(message: dict) -> bool:
        return message["parent_header"].get("msg_id") == asked and message["content"].get("execution_state") == "idle"

    return heard(client, over)


def test_the_button_stops_with_a_checkpoint_and_the_cell_goes_on_from_it(client, tmp_path):
    run = runs.Run(tmp_path / "run")
    for more in (2, 3):
        before = len(run.records())
        asked = send(client, TRAINS, cellId="a")
        first = heard(client, lambda message: curves([message]))
        while len(run.records()) < before + more:
            time.sleep(0.05)
        click(client, models(first)["ButtonModel"])
        rest = ended(client, asked)
        errors = [m["content"] for m in rest if m["msg_type"] == "error"]
        assert [(e["ename"], e["traceback"]) for e in errors] == [("Stopped", [stopping.LINE])]
        assert curves(rest) and not said(first + rest)
        assert run.checkpoint.exists() and not run.done
    epochs = run.records()["epoch"]
    lines = [json.loads(line)["epoch"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert list(epochs) == list(range(1, len(epochs) + 1)) and 5 <= len(epochs) < 400
    assert lines.count(1) == 1 and len(lines) <= len(epochs) + 1  # none but that which was under way is run again


def test_without_a_front_end_the_same_cell_prints_sober_text(client):
    send(client, TRAINS.replace("400", "2"))
    messages = heard(client)
    assert "pre-train: 100%" in said(messages) and "2/2" in said(messages)
    assert {m["msg_type"] for m in messages} == {"status", "execute_input", "stream"}


def test_an_interrupt_stops_as_the_button_does(client, tmp_path):
    """JupyterLab's own: a SIGINT to the kernel."""
    run = runs.Run(tmp_path / "run")
    asked = send(client, TRAINS, cellId="a")
    heard(client, lambda message: curves([message]))
    while not run.checkpoint.exists():
        time.sleep(0.05)
    client.parent.interrupt_kernel()
    assert [m["content"]["traceback"] for m in ended(client, asked) if m["msg_type"] == "error"] == [[stopping.LINE]]
    assert checkpoints.previous(run.checkpoint).exists() or run.checkpoint.exists()


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
