"""What a run found, opened again: row by row as it was; mended labels; learning from them."""

import json

import numpy as np
import pandas as pd
import pytest
from expected import refused
from PIL import Image
from reviewed import leave

from ptglab import data
from ptglab.audit import reopen
from ptglab.audit.corrections import Corrections
from ptglab.detect import label_errors
from ptglab.detect.suspects import Suspects
from ptglab.lab import runs
from ptglab.train import backbones


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    return leave(tmp_path_factory.mktemp("left") / "run")


@pytest.fixture(scope="module")
def found(left) -> reopen.Findings:
    return reopen.read(left[0].path)


def test_what_was_left_is_read_row_by_row(left, found):
    run, given, true = left
    assert (found.images.labels_given == given).all() and (found.images.labels_true == true).all()
    again = label_errors.detect("confidence", given, found.probs)
    read = found.suspects("confidence")
    for name in ("score", "flagged", "suggested"):
        assert (getattr(read, name) == getattr(again, name)).all(), name
    assert read.score.dtype == np.float32 and found.features.shape == (200, 256)


def test_detectors_are_those_that_the_stored_arrays_allow(left, found, monkeypatch):
    assert found.detectors[0] == "confidence" and {"knn", "ensemble", "small_loss"} <= set(found.detectors)
    assert "forgetting" not in found.detectors  # there is no history
    knn = label_errors.detect("knn", left[1], features=found.features)
    assert (found.suspects("knn").score == knn.score).all()
    monkeypatch.setattr(reopen, "MOST_COMPARED", 100)
    assert "knn" not in found.detectors and "small_loss" in found.detectors


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("params.json", '"subset": 200', '"subset": 199', ["other images than are in digits now"]),
        ("params.json", '"digits"', '"nowhere/"', ["no such file or folder: nowhere/"]),
        ("suspects.csv", '"id","given"', '"id","gave"', ["suspects.csv", "no table of suspects"]),
        ("suspects.csv", ",True", ",maybe", ["no table of suspects"]),
        ("suspects.csv", '\n"', '\n"5000', ["lists other images"]),
        ("suspects.csv", '","', '","cat', ["a class that the images do not have", "cat"]),
        ("suspects.csv", ",True", "inf,True", ["suspects.csv"]),
        ("fingerprint.txt", "", "0", ["made of other images"]),
    ],
)
def test_what_is_not_what_was_left_is_refused(tmp_path, name, old, new, words):
    run, *_ = leave(tmp_path / "run")
    path = run.path / name
    head, body = path.read_text().split("\n", 1) if old in ('\n"', '","') else ("", path.read_text())
    changed = body.replace(old.lstrip("\n"), new.lstrip("\n"), 1)
    assert changed != body
    path.write_text(f"{head}\n{changed}" if head else changed)
    refused(*words, call=reopen.read)(run.path)


def test_scores_that_are_none_and_arrays_of_another_set_are_refused(tmp_path):
    run, *_ = leave(tmp_path / "run")
    table = pd.read_csv(run.path / "suspects.csv", dtype=str)
    table.assign(score="inf").to_csv(run.path / "suspects.csv", index=False)
    refused("not finite", call=reopen.read)(run.path)
    table.to_csv(run.path / "suspects.csv", index=False)
    run.save_array("features", np.zeros((7, 3), np.float32))
    refused("features", "7 rows for 200 labels", call=reopen.read)(run.path)


def test_a_folder_without_suspects_is_refused(tmp_path):
    refused("no run at", call=reopen.read)(tmp_path)
    (tmp_path / "params.json").write_text('{"dataset": "digits"}')
    refused("holds no suspects.csv: audit images", call=reopen.read)(tmp_path)


def test_features_come_from_the_network_where_none_are_stored(tmp_path, few):
    run, *_ = leave(tmp_path / "run")
    (run.path / "arrays" / "features.npy").unlink()
    refused("neither features nor a network", call=lambda: reopen.read(run.path).features)()
    assert reopen.read(run.path).test is None
    network = backbones.build("resnet18", 2, few.images, 0)
    backbones.save(run.stage("supervised").weights, network)
    found = reopen.read(run.path)
    assert found.features.shape == (200, network.num_features)
    assert found.test[0].shape == (360, network.num_features) and len(found.test[1]) == 360


def decide(run: runs.Run, found: reopen.Findings, true: np.ndarray, number: int) -> Corrections:
    """Mend the `number` most suspicious labels by the truth, as a person would."""
    decisions = Corrections(run.path / "corrections.csv")
    names, given = found.images.class_names, found.images.labels_given
    for row in np.argsort(found.suspects("confidence").score)[:number]:
        decisions.add(found.images.ids[row], names[given[row]], "class", names[true[row]])
    return decisions


def test_mended_labels_are_written_and_nothing_else_changes(tmp_path, left, found):
    (run, given, true), out = left, runs.Run(tmp_path)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    decisions = decide(out, found, true, 30)
    expected, rows = given.copy(), np.argsort(found.suspects("confidence").score)
    expected[rows[:30]] = true[rows[:30]]
    assert not np.array_equal(given, expected)
    assert (found.apply(decisions, out)[0] == expected).all()
    taken = runs.Run(tmp_path / "mended").labels(found.images.ids, "digits")  # as notebooks 2 to 4 take them
    assert (taken["labels_given"] == expected).all() and (taken["labels_true"] == true).all()
    last = int(rows[-1])
    decisions.add(found.images.ids[last], str(given[last]), "drop")
    labels, kept = found.apply(decisions, out)
    assert (labels == expected).all() and np.flatnonzero(~kept).tolist() == [last]
    table = pd.read_csv(tmp_path / "mended.csv", dtype=str)
    assert table["id"].tolist() == [id for i, id in enumerate(found.images.ids) if i != last]
    assert table["label"].tolist() == [str(label) for label in expected[kept]]
    stage = runs.Run(tmp_path / "mended")
    assert (stage.array("labels_given") == expected[kept]).all() and (stage.array("labels_true") == true[kept]).all()
    assert {path: path.read_bytes() for path in before} == before


def test_mended_labels_are_what_a_folder_is_loaded_with(tmp_path):
    """Beside the images, mended.csv replaces the sub-folders; what was dropped is left out."""
    photos = tmp_path / "photos"
    for i in range(12):
        folder = photos / ("cat" if i % 2 else "-dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(folder / f"{i:02}.png")
    images = data.load(photos)
    run = runs.Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / "params.json").write_text(json.dumps({"dataset": str(photos), "labels": "", "seed": 0}))
    other = Suspects(np.arange(12, dtype=np.float32), np.ones(12, bool), 1 - images.labels_given)
    reopen.keep(run, images, other, "confidence")
    found = reopen.read(run.path)
    decisions = Corrections(run.path / "corrections.csv")
    decisions.add("cat/01.png", "cat", "suggestion", "-dog")
    decisions.add("cat/03.png", "cat", "drop")
    found.apply(decisions, run)
    (photos / "mended.csv").write_bytes((run.path / "mended.csv").read_bytes())
    again = data.load(photos)
    expected = {id: images.class_names[k] for id, k in zip(images.ids, images.labels_given, strict=True)}
    expected |= {"cat/01.png": "-dog"}
    del expected["cat/03.png"]
    assert dict(zip(again.ids, (again.class_names[k] for k in again.labels_given), strict=True)) == expected
    assert [id for id, _ in again.unreadable] == ["cat/03.png"]


def test_learning_from_mended_labels_shows_less_noise_and_a_better_head(left, found):
    run, given, true = left
    before = found.learn(given)
    after = found.learn(np.where(np.arange(200) < 150, true, given))
    assert set(before) == {"agree", "right", "joint", "clusterability"}
    assert after["right"] > before["right"] and after["agree"] > before["agree"] + 0.1
    assert after["joint"] < before["joint"] - 0.05 and after["clusterability"] < before["clusterability"] - 0.05
    table = reopen.compared(before, after)
    assert table.loc["out of fold, right about these images", "after"] == round(100 * after["right"], 2)
    without = found.learn(given, given == true)  # rows that are dropped are not learned from
    assert without["joint"] < 0.08 and without["agree"] == without["right"] > 0.85
