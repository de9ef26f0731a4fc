"""What tests of the explorer look at: a run that knows every true label, and a sweep whose cells take no time."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ptglab import data, files
from ptglab.audit import reopen
from ptglab.data import noise
from ptglab.detect import label_errors
from ptglab.lab import runs, spec, sweeps
from ptglab.ui import explorer, stored

RATE, KIND, FAILS = 0.4, "uniform", 0.8  # a cell of the last rate fails
CHOICE = {"init": "simclr", "noise_kind": KIND, "noise_rate": RATE}


def found_in(folder, images, kind=KIND, rate=RATE) -> tuple[reopen.Findings, np.ndarray]:
    """Leave in `folder` what a run finds that knows every true label, and open it; return that and the truth."""
    truth = images.labels_given
    given = noise.apply(kind, truth, rate, 10, seed=0, mapping="digits", images=images.images.numpy())
    probs = np.full((len(truth), 10), 0.02, np.float32)
    probs[np.arange(len(truth)), truth] = 0.82
    run = runs.start(folder, dataset="digits", subset=len(images), seed=0)
    suspects = label_errors.detect("disagreement", given, probs)
    reopen.keep(run, replace(images, labels_given=given), suspects, "disagreement", probs=probs)
    return reopen.read(run.path), truth


@pytest.fixture
def images() -> data.ImageSet:
    return data.load("digits").subset(150, seed=0)


@pytest.fixture
def opened(tmp_path, images) -> explorer.Explorer:
    found, truth = found_in(tmp_path / "one", images)
    return explorer.Explorer(found, np.column_stack([truth, np.arange(len(truth))]), truth)


def shown(html: str) -> list[int]:
    """Return the rows whose thumbnails a gallery shows, from its cards; the text of each picture names it, too."""
    rows = [int(row) for row in re.findall(r'data-row="(\d+)"', html)]
    assert rows == [int(row) for row in re.findall(r'alt="row (\d+): ', html)]
    return rows


def execute(cell, out, images) -> None:
    """Leave what the cell of an experiment leaves; of one of a pre-training, only that it has finished."""
    folder, p = out / cell.name, cell.parameters
    folder.mkdir(parents=True, exist_ok=True)
    if "noise_rate" in p:
        found_in(folder, images, p["noise_kind"], p["noise_rate"])
        row = {"dataset": "digits", "n_train": 150, "backbone": "b", "init": p["init"], "mode": p["mode"], "seed": 0,
               "recipe": "plain", "noise": p["noise_kind"], "noise_rate": p["noise_rate"], "loss": "ce",
               "accuracy_last": 1 - p["noise_rate"]}  # fmt: skip
        runs.Run(folder).save_results([row])
        table = {"epoch": [1, 2], "accuracy_test": [0.5, 1 - p["noise_rate"]]}
        pd.DataFrame(table | {"learned_right": 0.9, "learned_wrong": 0.1}).to_csv(folder / "curves.csv")
    (folder / "notebook.ipynb").write_text("{}")
    files.write_json(folder / spec.MARK, spec.left(folder))


@pytest.fixture
def swept(tmp_path, images, monkeypatch):
    """(An explorer of a sweep of which one experiment is stored, the names of the cells executed from then on)."""
    executed = []

    def run(cells, out, jobs, gathered):
        assert [cell.name for cell in gathered] == [cell.name for cell in spec.plan(plan)]
        for cell in cells:
            yield sweeps.Event(cell, "started")
            executed.append(cell.name)
            if cell.parameters.get("noise_rate") == FAILS:
                yield sweeps.Event(cell, "failed", error="InputError: made to fail")
            else:
                execute(cell, out, images)
                yield sweeps.Event(cell, "finished", 0.1)

    monkeypatch.setattr(sweeps, "run", run)
    plan = spec.read("explore", {"subset": "150"})
    store = stored.Stored(plan, tmp_path / "sweep")
    assert [event.state for *_, event in store.compute(CHOICE)] == ["started", "finished"] * 2
    executed.clear()
    return explorer.Explorer(store.read(**CHOICE), np.zeros((150, 2)), images.labels_given, store, CHOICE), executed
