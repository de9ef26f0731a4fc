"""An audit as a function: what it finds and leaves, resumed, refused, beside the notebook, and of bad inputs."""

import csv
import inspect
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bad_inputs import CASES
from expected import refused
from PIL import Image

from ptglab import audit, data
from ptglab.audit import stages
from ptglab.data import noise
from ptglab.errors import InputError
from ptglab.lab import metrics, notebooks, runs
from ptglab.train import backbones, patches, predict

QUICKLY = {"start": "patches", "flip": False, "device": "cpu"}
LEFT = {"suspects.csv", "unreadable.csv", "gallery.html", "summary.json", "duplicates.csv", "outliers.csv",
        "label_studio.json", "label_studio.xml", "fiftyone.csv", "params.json"}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory, digits) -> Path:
    """Return a folder of 300 digits, a fifth of them in a wrong sub-folder, named by the right one; one is no image."""
    folder, few = tmp_path_factory.mktemp("photos"), digits.subset(300, 0)
    given = noise.apply("uniform", few.labels_given, 0.2, 10, 0)
    for i, (image, label, true) in enumerate(zip(few.images, given, few.labels_given, strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / str(label) / f"{true}-{i}.png")
    (folder / "3" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def audited(photos, tmp_path_factory):
    """Return (its suspects, the folder of its audit)."""
    out = tmp_path_factory.mktemp("audited") / "out"
    return audit.run(photos, out, **QUICKLY), out


def rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_wrong_labels_are_found_and_everything_is_left(photos, audited):
    suspects, out = audited
    images = data.load(photos)
    wrong = np.array([id[0] != id[2] for id in images.ids])
    assert metrics.detection(suspects, wrong)["f1"] > 0.85
    assert {path.name for path in out.iterdir()} >= LEFT
    table = pd.read_csv(out / "suspects.csv")
    assert list(table.columns) == ["id", "given", "suggested", "score", "flagged"]
    assert table["id"].tolist() == [images.ids[row] for row in np.argsort(suspects.score, kind="stable")]
    assert [row["id"] for row in rows(out / "unreadable.csv")] == ["3/broken.png"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == 300 and summary["unreadable"] == 1 and summary["flagged"] == suspects.flagged.sum()
    assert summary["low"] <= summary["rate"] <= summary["high"] and summary["start"] == "patches"
    assert sum(number for *_, number in summary["confusions"]) <= summary["flagged"]


def test_another_detector_judges_what_is_stored(photos, audited, tmp_path):
    out = shutil.copytree(audited[1], tmp_path / "out")
    features = runs.Run(out / "features").path / "arrays" / "features.npy"
    before = features.stat().st_mtime_ns
    assert audit.run(photos, out, **QUICKLY, detector="forgetting", flag="7").flagged.sum() == 7  # by a history
    assert features.stat().st_mtime_ns == before and json.loads((out / "params.json").read_text())["flag"] == "7"
    rate = json.loads((out / "summary.json").read_text())["rate"]
    assert audit.run(photos, out, **QUICKLY, detector="knn", flag="rate").flagged.sum() == round(300 * rate)


def test_other_parameters_and_other_images_are_refused(photos, audited, tmp_path):
    out = shutil.copytree(audited[1], tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*.csv")}
    refused(str(out), "seed 0 there, 1 here", call=audit.run)(photos, out, **QUICKLY, seed=1)
    others = shutil.copytree(photos, tmp_path / "photos")
    next((others / "3").glob("[0-9]*.png")).unlink()
    (out / "params.json").write_text((out / "params.json").read_text().replace(str(photos), str(others)))
    refused(str(out), "other images", call=audit.run)(others, out, **QUICKLY)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("options", "words"), [
    ({"budget": "quik"}, ["'quik'", "'quick'"]), ({"detector": "ensembel"}, ["'ensemble'"]),
    ({"flag": "some"}, ["flag", "'some'"]), ({"seed": "x"}, ["'seed'", "int"]), ({"flip": 1}, ["'flip'", "bool"]),
    ({"start": "scrach"}, ["'scratch'"]), ({"start": "patchs"}, ["'patches'"]), ({"device": "gpu"}, ["'gpu'"]),
    ({"image_size": 3}, ["image_size"]), ({"labels": "none"}, ["'none'"]), ({"source": "nowhere/"}, ["nowhere/"]),
], ids=str)  # fmt: skip
def test_what_is_refused_leaves_nothing(tmp_path, options, words):
    refused(*words, call=audit.run)(**{"source": "digits", "out": tmp_path / "out"} | options)
    assert not list(tmp_path.iterdir())


def test_a_handful_of_images_and_a_single_class_are_refused(photos, tmp_path):
    for folders, words in (("1", "same label"), ("01", "needs 10")):
        for name in folders:
            (tmp_path / words / name).mkdir(parents=True)
            for path in sorted((photos / name).iterdir())[: 12 if folders == "1" else 2]:
                shutil.copy(path, tmp_path / words / name)
        refused(words, call=audit.run)(tmp_path / words, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_and_defaults_are_those_of_the_notebook():
    parameters = inspect.signature(audit.run).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ("source", "out")}
    declared = notebooks.declared_parameters(stages.NOTEBOOK)
    assert defaults == {name: value for name, value in declared.items() if name not in ("dataset", "run_dir")}


def test_an_interrupted_audit_is_resumed(photos, audited, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "out_of_fold", stopped)
        with pytest.raises(KeyboardInterrupt):
            audit.run(photos, tmp_path / "out", **QUICKLY)
    assert (tmp_path / "out" / "features" / "done").exists() and not (tmp_path / "out" / "suspects.csv").exists()
    monkeypatch.setattr(patches, "learn", None)  # it is not called again
    audit.run(photos, tmp_path / "out", **QUICKLY)
    assert (tmp_path / "out" / "suspects.csv").read_bytes() == (audited[1] / "suspects.csv").read_bytes()


def test_a_service_audits_in_a_thread_with_a_network_tuned_by_fold(photos, tmp_path):
    small = {
        "start": "scratch",
        "method": "barlow_twins",
        "budget": "thorough",
        "width": 2,
        "epochs": 1,
        "image_size": 8,
    }
    done = []
    thread = threading.Thread(
        target=lambda: done.append(audit.run(photos, tmp_path / "out", **QUICKLY | small, detector="disagreement"))
    )
    thread.start()
    thread.join()
    assert len(done[0].score) == 300
    run = runs.Run(tmp_path / "out")
    assert len(run.stage("pretrain").records()) == 1 and len(run.stage("probs").records()) == 50
    assert run.stage("features").array("features").shape == (300, 16)
    assert backbones.load(run.stage("pretrain").weights)[0].sizes["width"] == 2  # a start for another audit


@pytest.mark.slow
def test_the_notebook_leaves_the_same_and_reuses_what_is_finished(photos, audited, tmp_path):
    again = shutil.copytree(audited[1], tmp_path / "again")
    features = runs.Run(again / "features").path / "arrays" / "features.npy"
    before = features.stat().st_mtime_ns
    (again / "suspects.csv").unlink()
    for out in (again, tmp_path / "new"):
        options = [f"{name}={value}" for name, value in QUICKLY.items()]
        values = notebooks.values(stages.NOTEBOOK, [f"dataset={photos}", f"run_dir={out}", *options])
        notebooks.execute(stages.NOTEBOOK, out / "report.ipynb", values)
        for name in ("suspects.csv", "summary.json", "duplicates.csv", "outliers.csv", "unreadable.csv"):
            assert (out / name).read_bytes() == (audited[1] / name).read_bytes(), name
    assert features.stat().st_mtime_ns == before
    audit.run(photos, tmp_path / "new", **QUICKLY)


# ---- what people leave in folders of images: one clear line, or all that can be read audited

SOME = CASES[::20]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c in SOME else pytest.mark.soak) for c in CASES]
)
def test_bad_inputs(case, tmp_path, monkeypatch):
    monkeypatch.setattr(patches, "SAMPLES", 1000)  # patches of a dozen small images are soon drawn twice
    (tmp_path / "source").mkdir()
    source, labels = case.build(tmp_path / "source")
    out = tmp_path / "out"
    try:
        audit.run(source, out, labels=labels or "", start="patches")
    except InputError as error:
        assert "\n" not in str(error) and not out.exists()
        assert case.expected == "refused" or case.readable < 10 or "same label" in str(error), error
        return
    assert case.expected == "audited"
    found, left = rows(out / "suspects.csv"), rows(out / "unreadable.csv")
    assert len(found) == len({row["id"] for row in found}) == case.readable
    assert case.listed is None or len(left) == case.listed
    assert not {row["id"] for row in found} & {row["id"] for row in left}
    page = (out / "gallery.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and "<img src=x" not in page
    assert {path.name for path in out.iterdir()} >= LEFT
