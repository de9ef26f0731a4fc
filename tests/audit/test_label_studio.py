"""What is left for Label Studio goes into a real one: every task with its picture and its prediction."""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptglab import data
from ptglab.audit import exports
from ptglab.detect.suspects import Suspects

NAMES = ["plain.png", "<img src=x>.png", 'a,"b"\nc & d.png', "100%25 #1?x=1.png", "caf\u0065\u0301 画像 🦊.png",
         " space and 'quotes' .png", "{{ 7 * 7 }}.png", "semi;colon+plus=.png", "return\rhere.png"]  # fmt: skip
CLASSES = ['<b> & "dog"', "NA", "cat", "قطة"]
USER, TOKEN = "somebody@example.org", "0123456789abcdef0123456789abcdef01234567"
QUIET = {f"LABEL_STUDIO_{name}": "false" for name in ("COLLECT_ANALYTICS", "LATEST_VERSION_CHECK")}


@pytest.fixture(scope="module")
def label_studio(tmp_path_factory) -> Path:
    """The command of a Label Studio in an environment of its own; skipped if it cannot be installed."""
    bin = tmp_path_factory.mktemp("label-studio") / "bin"
    for command in ([sys.executable, "-m", "venv", bin.parent], [bin / "pip", "install", "-q", "label-studio"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Label Studio cannot be installed: {done.stderr.strip()[-300:]}")
    return bin / "label-studio"


@pytest.fixture(params=["files", "pixels"])
def left(request, tmp_path) -> tuple[data.ImageSet, np.ndarray, Path, dict[str, str]]:
    """A set, the probabilities, the folder of its audit, and the next steps: twice 18 images, of files with odd names
    in four folders, and without files."""
    rng, source, run = np.random.default_rng(0), tmp_path / "photos & co", tmp_path / "a run"
    for i, name in enumerate([*NAMES, *(f"x {name}" for name in NAMES)]):
        (source / str(i % 4)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(source / str(i % 4) / name)
    images = replace(data.load(source), class_names=CLASSES)
    images = images if request.param == "files" else replace(images, files=())
    suspects = Suspects(rng.random(18).astype(np.float32), np.arange(18) % 3 < 2, (images.labels_given + 1) % 4)
    summary = {"detector": "ensemble", "unknown": "Nothing.", "flagged": 1, "images": 9}
    probability = rng.random(18)
    run.mkdir()
    return images, probability, run, exports.write(run, images, suspects, summary, source, probability)


@pytest.fixture
def call(label_studio, left, tmp_path):
    """A function that asks the REST API of a Label Studio started as the first line says, on a port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    *variables, name, start = shlex.split(left[-1]["label_studio"].splitlines()[0])
    assert (name, start) == ("label-studio", "start")
    words = [label_studio, start, "--no-browser", "--internal-host", "127.0.0.1", "--port", port, "--data-dir",
             tmp_path / "data", "--username", USER, "--password", "password", "--user-token", TOKEN,
             "--enable-legacy-api-token"]  # fmt: skip
    env = os.environ | QUIET | {"PYTHONUNBUFFERED": "1"} | dict(variable.split("=", 1) for variable in variables)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, content: object = None) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Token {TOKEN}"})
        if content is not None:
            request.data = json.dumps(content).encode()
            request.add_header("Content-Type", "application/json")
        with direct.open(request) as answer:
            return answer.read()

    with subprocess.Popen(words, env=env, **pipes) as server:
        try:
            said = []
            for line in server.stdout:
                said.append(line)
                if "Starting development server" in line:
                    break
            assert server.poll() is None, "".join(said[-20:])
            threading.Thread(target=server.stdout.read, daemon=True).start()  # or the pipe fills up
            yield ask
        finally:
            server.kill()


@pytest.mark.slow
def test_every_task_has_its_picture_and_its_prediction(left, call):
    """By the three lines: the server, the settings of a project, the import."""
    images, probability, run, steps = left
    tasks = json.loads((run / "label_studio.json").read_text(encoding="utf-8"))
    config = (run / "label_studio.xml").read_text(encoding="utf-8")
    project = json.loads(call("/api/projects/", {"title": "suspects", "label_config": config}))["id"]
    path = steps["label_studio"].splitlines()[1].partition(": path ")[2].removesuffix(", then Save (not Save & Sync)")
    call("/api/storages/localfiles/", {"project": project, "path": path, "title": "pictures", "use_blob_urls": True})
    taken = json.loads(call(f"/api/projects/{project}/import", tasks))
    assert taken["task_count"] == taken["prediction_count"] == len(tasks) == 12
    rows, pictures = {id: row for row, id in enumerate(images.ids)}, 0
    for task in json.loads(call(f"/api/tasks?project={project}&fields=all&page_size=100"))["tasks"]:
        row = rows.pop(task["data"]["id"])
        assert task["data"]["given"] == CLASSES[images.labels_given[row]]
        [prediction] = task["predictions"]
        assert prediction["score"] == pytest.approx(probability[row])
        assert prediction["result"][0]["value"]["choices"] == [CLASSES[(images.labels_given[row] + 1) % 4]]
        sent = call(task["data"]["image"])
        pictures += sent == (images.files[row] if images.files else run / "images" / f"{row:06d}.png").read_bytes()
    print(f"{pictures} of {len(tasks)} tasks with picture and prediction")
    assert pictures == len(tasks)
