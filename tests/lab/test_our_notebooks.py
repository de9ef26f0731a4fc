"""The notebooks: their shape, their parameters, and that they run by papermill from clean."""

import json
import shutil
import statistics
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ptglab import data
from ptglab.audit import reopen
from ptglab.data import noise
from ptglab.errors import InputError
from ptglab.lab import notebooks, runs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import papermill

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SMALL = {"subset": 300, "width": 8}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@each
def test_shape(path):
    """20-35 cells; short ones; one tagged `parameters`; no outputs; a question first, something to try last."""
    code, text = cells(path, "code"), cells(path, "markdown")
    lengths = [len(c["source"]) for c in code]
    assert 20 <= len(code) + len(text) <= 35
    assert statistics.median(lengths) < 8
    assert max(lengths) < 25
    assert sum(line.lstrip().startswith("def ") for c in code for line in c["source"]) <= 2
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    assert "**Question.**" in "".join(text[0]["source"])
    assert "arXiv" in "".join(text[0]["source"])
    for heading in ("## What it means", "## What is weak here", "## To discuss", "**Try:**"):
        assert heading in "".join(text[-1]["source"])
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"


@each
def test_parameters_are_commented_literals(path):
    declared = notebooks.declared_parameters(str(path))
    assert {"run_dir", "dataset", "labels", "seed", "device"} <= declared.keys()
    lines = next(c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", []))["source"]
    assert all("  # " in line for line in lines)
    assert set(papermill.inspect_notebook(str(path))) == declared.keys()
    if "epochs" in declared and path.stem > "01":
        assert {"backbone", "width", "batch_size"} <= declared.keys()


def execute(name: str, folder: Path, **params) -> Path:
    """Execute a notebook by papermill in `folder`, as a user there would."""
    out = folder / f"{name}.ipynb"
    papermill.execute_notebook(
        str(notebooks.notebook_path(name)), str(out), params, kernel_name="python3", progress_bar=False, cwd=str(folder)
    )
    return out


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Path:
    """Notebooks 1 to 4, run in one folder with everything small."""
    folder = tmp_path_factory.mktemp("steps")
    execute("01_data_and_noise", folder, subset=SMALL["subset"])
    execute("02_pretrain", folder, epochs=2, batch_size=64, **SMALL)
    execute("03_finetune", folder, epochs=2, rates="0.6", **SMALL)
    execute("04_label_errors", folder, epochs=1, **SMALL)
    return folder / "runs"


@pytest.mark.slow
def test_steps_hand_results_on(steps):
    results = pd.read_csv(steps / "04_label_errors" / "results.csv")
    assert list(results.columns) == runs.RESULT_COLUMNS
    assert set(zip(results["init"], results["mode"], strict=True)) == {
        ("scratch", "full"), ("random", "linear"), ("pixels", "linear"), ("patches", "linear"), ("simclr", "linear"),
        ("simclr", "light"), ("simclr", "full"),
    }  # fmt: skip
    assert len(results) == 7 * results["detector"].nunique()
    measured = ["accuracy_last", "accuracy_best", "accuracy_selected", "f1", "balanced_accuracy", "auroc"]
    assert results[measured].notna().all(axis=None)
    assert (results["accuracy_best"] >= results[["accuracy_last", "accuracy_selected"]].max(axis=1)).all()
    assert results["effective_rate"].between(0.3, 0.5).all()


@pytest.mark.slow
def test_a_second_run_reuses_what_is_finished(steps):
    before = {p: p.stat().st_mtime_ns for p in steps.glob("0[23]*/**/model.safetensors")}
    assert len(before) > 4
    execute("02_pretrain", steps.parent, epochs=2, batch_size=64, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(papermill.PapermillExecutionError, match="holds labels of other images"):
        execute("02_pretrain", steps.parent, run_dir="runs/other", subset=200, width=8, epochs=1)


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A folder of 400 digits, a fifth of them in the wrong sub-folder, one of them no image, audited; and the truth."""
    folder = tmp_path_factory.mktemp("audit")
    digits = data.load("digits").subset(400, seed=0)
    given = noise.apply("uniform", digits.labels_given, 0.2, 10, seed=0)
    for i, (image, label) in enumerate(zip(digits.images, given, strict=True)):
        (folder / "photos" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / "photos" / str(label) / f"{i:03}.png")
    (folder / "photos" / "3" / "broken.png").write_bytes(b"no image")
    execute("06_audit_your_images", folder, dataset="photos", run_dir="out", start="patches", flip=False)
    return folder, digits.labels_given


@pytest.mark.slow
def test_an_audit_finds_the_wrong_labels(audited):
    folder, truth = audited
    table = pd.read_csv(folder / "out" / "suspects.csv", dtype={"given": int, "suggested": int})
    assert list(table.columns) == ["id", "given", "suggested", "score", "flagged"]
    assert len(table) == table["id"].nunique() == 400 and table["score"].is_monotonic_increasing
    true = truth[table["id"].str[2:5].astype(int)]
    wrong = (table["given"] != true).to_numpy()
    hits = (wrong & table["flagged"]).sum()
    assert 2 * hits / (wrong.sum() + table["flagged"].sum()) > 0.9
    assert (table["suggested"] == true)[wrong & table["flagged"]].mean() > 0.9
    assert pd.read_csv(folder / "out" / "unreadable.csv")["id"].tolist() == ["3/broken.png"]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["images"] == 400 and summary["unreadable"] == 1 and summary["start"] == "patches"
    assert summary["low"] <= wrong.mean() <= summary["high"]
    assert sum(n for *_, n in summary["confusions"]) <= summary["flagged"]


@pytest.mark.slow
def test_an_audit_goes_on_with_another_flag_and_refuses_other_images(audited, tmp_path):
    folder = shutil.copytree(audited[0], tmp_path / "copy")
    features = folder / "out" / "features" / "arrays" / "features.npy"
    before = features.stat().st_mtime_ns
    again = {"dataset": "photos", "run_dir": "out", "start": "patches", "flip": False}
    execute("06_audit_your_images", folder, **again, flag="7", detector="knn")
    assert pd.read_csv(folder / "out" / "suspects.csv")["flagged"].sum() == 7
    assert features.stat().st_mtime_ns == before
    some = next((folder / "photos" / "3").glob("[0-9]*.png"))
    (folder / "photos" / "0" / "new.png").write_bytes(some.read_bytes())
    with pytest.raises(papermill.PapermillExecutionError, match="begun with other images or labels"):
        execute("06_audit_your_images", folder, **again)
    with pytest.raises(papermill.PapermillExecutionError, match="seed 0 there, 1 here"):
        execute("06_audit_your_images", folder, **again, seed=1)


@pytest.mark.slow
def test_runs_of_notebooks_4_and_9_can_be_reviewed(steps):
    """What they leave is opened, and their suspects are those they drew."""
    execute("09_one_experiment", steps.parent, subset=SMALL["subset"], width=4, epochs=1, epochs_fold=1)
    for name, params in {"04_label_errors": "ensemble", "09_one_experiment": "confidence"}.items():
        found = reopen.read(steps / name)
        assert found.detector == params and len(found.images) == SMALL["subset"]
        assert (found.images.labels_given != found.images.labels_true).mean() > 0.3
        assert found.features.shape[0] == SMALL["subset"] and found.learn(found.images.labels_given)["right"] > 0.1


def test_papermill_alone_is_stopped_at_an_unknown_parameter(tmp_path):
    """papermill only warns; the notebook's first cell refuses."""
    with pytest.raises(papermill.PapermillExecutionError, match="'epohcs': did you mean 'epochs'") as caught:
        execute("02_pretrain", tmp_path, epohcs=3)
    assert caught.value.ename == InputError.__name__
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_downstream_uses_are_measured(tmp_path):
    """Few labels, the order of checking, propagated labels; everything small."""
    few = {"counts": "1,5", "draws": 2, "draws_scratch": 1, "steps": 3}
    execute("11_downstream", tmp_path, epochs=2, batch_size=64, **few, **SMALL)
    run = runs.Run(tmp_path / "runs" / "11_downstream")
    read = {name: pd.read_csv(run.path / "figures" / f"{name}.csv") for name in ("transfer", "active", "propagation")}
    transfer = read["transfer"].groupby(["look", "labels_a_class"])["value"].mean()
    assert transfer.between(0.1, 1).all() and (transfer["pixels"].diff().dropna() > 0).all()
    active = read["active"].pivot_table(index="checked", columns="order", values="found")
    assert active.index[-1] == SMALL["subset"] and (active.iloc[-1] == 1).all()
    assert active.le(active["ideal"], axis=0).all(axis=None) and (active.diff().dropna() >= 0).all(axis=None)
    middle = active.iloc[len(active) // 2]
    assert (middle[["ensemble", "confidence", "knn"]] > middle["random"] + 0.1).all()
    spread = read["propagation"].groupby(["start", "look", "x"])["value"].mean()
    assert spread["given", "pixels", 0.9] > spread["given", "pixels", 0.2] + 0.1
    assert list(run.results().columns) == runs.RESULT_COLUMNS and (run.results()["auroc"] > 0.7).all()


@pytest.mark.slow
def test_suspects_are_reviewed_without_a_browser(audited):
    """Of the audit of a folder: what taking 40 suggestions would do; nothing of the audit or the folder changes."""
    folder, truth = audited
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    execute("07_review_suspects", folder, audit_run="out", run_dir="reviewed", take_suggestions=40)
    run = folder / "reviewed"
    assert not (run / "corrections.csv").exists()  # which holds decisions of people only
    mended = pd.read_csv(run / "demonstration" / "mended.csv", dtype={"label": int})
    true, given = truth[mended["id"].str[2:5].astype(int)], mended["id"].str[0].astype(int)
    assert len(mended) == 400 and (given != mended["label"]).sum() == 40
    assert (mended["label"] == true).sum() - (given == true).sum() > 30
    noise = pd.read_csv(run / "figures" / "mended.csv", index_col=0).filter(like="estimated share of wrong", axis=0)
    assert len(noise) == 2 and (noise["after"] < noise["before"] - 3).all()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_starts_are_compared_without_and_with_our_own(steps):
    """Each is scored with both detectors on the same planted labels, and the network of notebook 2 is among them."""
    execute("10_starts", steps.parent, subset=SMALL["subset"], width=8, sizes="32", pretrain_run="runs/02_pretrain")
    table = pd.read_csv(steps / "10_starts" / "starts.csv")
    starts = ["random", "pixels", "patches", "lite0 at 32", "simclr", "together"]
    assert list(table["start"].unique()) == starts and (table.groupby("start")["detector"].nunique() == 2).all()
    best = table[table["start"] == "pixels"].set_index("detector")
    assert best["knn"].iloc[0] > 0.8 and best.loc["ensemble", "f1"] > 0.8
    assert table[["knn", "agree", "f1", "average_precision"]].apply(lambda x: x.between(0, 1)).all(axis=None)
