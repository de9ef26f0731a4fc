"""How well wrong labels are found, beside cleanlab: `make detection`. Keeps and prints what it measured.

Takes 5,000 images of CIFAR-10 with people's labels: torchvision's copy with the label file of CIFAR-10N in PTGLAB_DATA,
or a parquet file that PTGLAB_CIFAR10N names. Leaves runs/detection.
"""

import csv
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from ptglab import cli, data
from ptglab.data import noise
from ptglab.detect import label_errors
from ptglab.errors import InputError
from ptglab.lab import figures, metrics, runs
from ptglab.train import backbones, engine, finetune, predict

OUT = Path("runs/detection")
HUMAN = ["label_aggre", "label_random1", "label_worse"]
NUMBER, SEEDS = 5000, 3
KINDS = [("uniform", r) for r in (0.05, 0.1, 0.2, 0.4, 0.6)] + [("asymmetric", r) for r in (0.05, 0.1, 0.2, 0.4, 0.6)]
KINDS += [("instance", r) for r in (0.1, 0.2, 0.4, 0.6)]
MEASURES = ["f1", "balanced_accuracy", "average_precision"]


@pytest.fixture(scope="module")
def photos() -> Path:
    """5,000 photographs as a folder of PNG files, with a CSV of true and people's labels."""
    source = os.environ.get("PTGLAB_CIFAR10N", "cifar10")
    folder = OUT / "photos"
    if (folder / "labels.csv").exists():
        return folder
    try:
        columns = {name: data.load(source, labels=name).subset(NUMBER, seed=0) for name in HUMAN}
    except InputError as error:
        pytest.skip(f"CIFAR-10N is not here: {error}")
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    first = columns[HUMAN[0]]
    names = np.array(first.class_names)
    for id, image in zip(first.ids, first.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "images" / f"{id}.png")
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", *HUMAN])
        given = [names[s.labels_given] for s in columns.values()]
        rows = zip(first.ids, names[first.labels_true], *given, strict=True)
        writer.writerows([f"images/{id}.png", *labels] for id, *labels in rows)
    return folder


def audited(photos: Path, column: str, method: str = "auto") -> runs.Run:
    """The audit, quick, of one column, from nothing."""
    out, notebook = OUT / (column if method == "auto" else f"{column}_{method}"), "06_audit_your_images"
    given = [f"dataset={photos}", f"labels={column}", f"run_dir={out}", "start=scratch", f"method={method}"]
    cli._execute(notebook, out / "report.ipynb", cli._values(notebook, given))
    return runs.Run(out)


def cleanlabs(x: np.ndarray, given: np.ndarray) -> dict[str, label_errors.Suspects]:
    """What cleanlab finds with scikit-learn's logistic regression on `x` [N, D]: its tutorial for images."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_self_confidence_for_each_label
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=100))  # as strict as our own
    probs = cross_val_predict(head, x, given, cv=5, method="predict_proba")
    score = get_self_confidence_for_each_label(given, probs)
    rules = ["prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given"]
    return {rule: label_errors.Suspects(score, find_label_issues(given, probs, filter_by=rule), given)
            for rule in rules}  # fmt: skip


@pytest.mark.bench
@pytest.mark.filterwarnings("ignore")
def test_people(photos, capsys):
    """The default detector is within .02 of the best row on each measure and each column of people's labels."""
    tables = []
    for column in HUMAN:
        run = audited(photos, column)
        ours = run.results().assign(by="ptglab")
        images = data.load(photos, labels=column)
        wrong = images.labels_given != images.labels_true
        for features, x in (
            ("pixels", images.images.flatten(1).numpy() / 255),
            ("our features", run.stage("features").array("features")),
        ):
            rows = [metrics.detection(found, wrong) | {"detector": rule, "by": f"cleanlab, {features}"}
                    for rule, found in cleanlabs(x, images.labels_given).items()]  # fmt: skip
            ours = pd.concat([ours, pd.DataFrame(rows)])
        tables.append(ours.assign(labels=column, effective_rate=wrong.mean()))
    table = pd.concat(tables)[["labels", "effective_rate", "by", "detector", "precision", "recall", *MEASURES]]
    table = table.assign(n=NUMBER, **runs.stamp())
    table.to_csv(OUT / "human.csv", index=False)
    with capsys.disabled():
        wide = table.pivot_table(MEASURES, ["by", "detector"], "labels", sort=False)
        print(f"\n{NUMBER:,} images of CIFAR-10, people's labels, budget quick; kept in {OUT}")
        print(wide.round(3).to_string())
    best = table.groupby("labels")[MEASURES].max()
    default = table[(table["by"] == "ptglab") & (table["detector"] == "ensemble")].set_index("labels")[MEASURES]
    assert (default >= best - 0.02).all(axis=None), (best - default).round(3).to_string()


@pytest.mark.bench
@pytest.mark.filterwarnings("ignore")
def test_starts(photos, capsys):
    """What the quick budget learns from nothing, by patches or a network: the first finds more, in less time."""
    rows = []
    for method in ("patches", "simclr", "barlow_twins"):
        start = time.perf_counter()
        run = audited(photos, "label_random1", method)
        row = run.results().set_index("detector").loc["ensemble", MEASURES].to_dict()
        probs, images = run.stage("probs").array("probs"), data.load(photos, labels="label_random1")
        row |= {"accuracy_out_of_fold": (probs.argmax(1) == images.labels_true).mean()}
        rows.append({"method": method, "seconds": time.perf_counter() - start} | row)
    table = pd.DataFrame(rows).assign(n=NUMBER, labels="label_random1", **runs.stamp())
    table.to_csv(OUT / "starts.csv", index=False)
    with capsys.disabled():
        print(f"\n{NUMBER:,} images of CIFAR-10, label_random1, budget quick, ensemble; kept in {OUT}")
        print(table.drop(columns=["n", "labels", "commit", "torch_version"]).round(3).to_string(index=False))
    assert table.loc[0, MEASURES].ge(table.loc[1:, MEASURES].max()).all()


def history(features: np.ndarray, given: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Margins [30, N] of a linear head over its epochs."""
    margins, head = np.empty((30, len(given)), np.float32), backbones.head(features.shape[1], num_classes)
    for _ in finetune.train(nn.Identity(), head, torch.tensor(features), given, mode="linear", epochs=30, seed=seed,
                            validation=0, history=margins, place=engine.place()):  # fmt: skip
        pass
    return margins


def draw() -> None:
    """Draw kinds.csv, and human.csv where it is, as one table of F1."""
    kinds = pd.read_csv(OUT / "kinds.csv")
    if (OUT / "human.csv").exists():
        human = pd.read_csv(OUT / "human.csv").query("by == 'ptglab'")
        kinds = pd.concat([kinds, human.assign(noise="people", noise_rate=human["effective_rate"])])
    wide = kinds.pivot_table("f1", "detector", ["noise", "noise_rate"], sort=False)
    rates = kinds.groupby(["noise", "noise_rate"])["effective_rate"].mean()
    figures.style()
    figure = Figure(figsize=(12, 5))
    ax = figure.add_subplot()
    firsts = dict((kind, rate) for kind, rate in reversed(wide.columns.tolist()))  # a kind is named once
    heads = [f"{rates[kind, rate]:.0%}\n{kind * (firsts[kind] == rate)}" for kind, rate in wide.columns]
    figures.grid(ax, wide.to_numpy(), list(wide.index), heads, "F1 of the flags")
    ax.set(ylabel="", xlabel="share of labels that are wrong, by the kind of noise")
    figures.caption(figure, images=f"{NUMBER:,}", dataset="CIFAR-10 (JPEG copy)", draws=SEEDS, people="1 draw",
                    commit=kinds["commit"].iloc[0])  # fmt: skip
    figure.savefig(OUT / "kinds.png", dpi=150, bbox_inches="tight")


@pytest.mark.bench
def test_kinds_of_noise(photos, capsys):
    """Every detector on noise of every kind made from true labels, on features of the quick audit; mean F1 of draws."""
    run = audited(photos, HUMAN[0])
    images, features = data.load(photos), np.array(run.stage("features").array("features"))
    true, k, rows = images.labels_given, images.num_classes, []
    for kind, rate in KINDS:
        options = {"mapping": "cifar10", "images": images.images.numpy()}
        givens = [noise.apply(kind, true, rate, k, seed, **options) for seed in range(SEEDS)]
        every = predict.out_of_fold(features, np.stack(givens), k, repeats=4)
        for seed, (given, probs) in enumerate(zip(givens, every, strict=True)):
            inputs = {"probs": probs, "features": features, "history": history(features, given, k, seed)}
            about = {"noise": kind, "noise_rate": rate, "effective_rate": (given != true).mean(), "seed": seed}
            for name in label_errors.DETECTORS:
                found = label_errors.detect(name, given, **inputs, seed=seed)
                rows.append(about | {"detector": name} | metrics.detection(found, given != true))
    table = pd.DataFrame(rows).assign(n=NUMBER, **runs.stamp())
    table.to_csv(OUT / "kinds.csv", index=False)
    with capsys.disabled():
        print(f"\nF1 on {NUMBER:,} images of CIFAR-10, mean of {SEEDS} draws; kept in {OUT}")
        print(table.pivot_table("f1", "detector", ["noise", "noise_rate"], sort=False).round(2).to_string())
    draw()
    assert table[MEASURES].notna().all(axis=None)
