"""Recipes of self-supervision at equal time on one thread of a CPU: `make recipes`. Leaves runs/recipes.

Time is the processor's, of training alone, so that what else the machine does takes nothing from any recipe. CIFAR-10
is torchvision's copy in PTGLAB_DATA, or the parquet folder that PTGLAB_CIFAR10 names. Rows are appended as they are
measured, and those that are there are not measured again.
"""

import math
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from torch import Tensor

from ptglab import data, files
from ptglab.errors import InputError
from ptglab.lab import figures, metrics, runs
from ptglab.train import backbones, engine, predict, pretrain

OUT = Path("runs/recipes")
SOURCES = {"cifar10": os.environ.get("PTGLAB_CIFAR10", "cifar10"), "digits": "digits"}
NUMBER, TESTS, WIDTH, SHOWN = 5000, 1000, 16, 3  # images, channels of the first stage, points of a curve
MINUTES = {"cifar10": float(os.environ.get("PTGLAB_MINUTES", 5)), "digits": 1.0}
SEEDS = range(int(os.environ.get("PTGLAB_SEEDS", 1)))
ARMS = {  # name -> method, schedule, what is changed: our heads are as narrow as in the sweeps for a CPU
    "untrained": ("simclr", "full", {}),
    "SimCLR, short": ("simclr", "short", {"projection": 256}),
    "SimCLR, paper": ("simclr", "paper", {}),
    "SimCLR, dkobak": ("simclr", "dkobak", {}),
    "SimCLR, full": ("simclr", "full", {"projection": 256}),
    "EMP-SSL, 8 crops of 16 pixels": ("emp_ssl", "short", {}),
    "Barlow Twins, short": ("barlow_twins", "short", {"projection": 256}),
    "VICReg, short": ("vicreg", "short", {"projection": 256}),
}
PLACE = engine.place("cpu", compile_from=math.inf)


def loaded(name: str) -> tuple[data.ImageSet, data.ImageSet]:
    """Return up to NUMBER training images and TESTS test images of a set, the same for every recipe and seed."""
    try:
        train, test = (data.load(SOURCES[name], split) for split in ("train", "test"))
    except InputError as error:
        pytest.skip(f"{name} is not here: {error}")
    return tuple(x.subset(min(most, len(x)), seed=0) for x, most in ((train, NUMBER), (test, TESTS)))


def seconds(images: Tensor, row: pretrain.Recipe, method: str, options: dict) -> float:
    """Return the processor's seconds of a mean epoch, by the second of two on a part of the images, on small views."""
    part = images[: max(2 * row.batch_size, len(images) // 8)]
    network = backbones.build("resnet18", WIDTH, images, 0)
    steps = pretrain.train(network, part, method, epochs=20, place=PLACE, **options)
    next(steps)
    start = time.process_time()
    next(steps)
    whole = len(images) // row.batch_size / (len(part) // row.batch_size)
    cheap = row.small * row.size**2 + 1 - row.small  # of all epochs, relative to one on whole views
    return (time.process_time() - start) * whole * (cheap / row.size**2 if row.small else 1)


@pytest.mark.bench
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", SOURCES)
def test_equal_minutes(name, arm, seed, capsys):
    """kNN accuracy over minutes and, at the end, of a linear head; the bank's and the head's labels are clean."""
    path = OUT / f"{name}-{arm}-{seed}.csv".replace(" ", "_")
    if path.exists():
        return
    OUT.mkdir(parents=True, exist_ok=True)
    (train, test), (method, schedule, changes) = loaded(name), ARMS[arm]
    truth = train.labels_given if train.labels_true is None else train.labels_true
    row = pretrain.recipe(method, schedule, **changes)
    options = changes | {"schedule": schedule, "augmentation": pretrain.views(method, name, schedule)}
    epochs = max(2, round(60 * MINUTES[name] / seconds(train.images, row, method, options)))
    network = backbones.build("resnet18", WIDTH, train.images, seed)
    steps = pretrain.train(network, train.images, method, epochs=epochs, seed=seed, place=PLACE, **options)
    spent, rows = 0, []
    epochs *= arm != "untrained"
    for epoch in range(epochs + 1):
        start = time.process_time()
        if epoch:
            next(steps)
        spent += time.process_time() - start
        if epoch in (0, epochs) or epoch * SHOWN // epochs > (epoch - 1) * SHOWN // epochs:
            bank, queries = (predict.features(network, x.images, PLACE) for x in (train, test))
            knn = metrics.knn_accuracy(bank, truth, queries, test.labels_given)
            rows.append({"epoch": epoch, "minutes": spent / 60 * (epoch > 0), "knn": knn})
    weight, bias = predict.linear_heads(bank, truth, train.num_classes)
    rows[-1]["linear"] = float(((queries @ weight[0] + bias[0]).argmax(1) == test.labels_given).mean())
    about = {
        "dataset": name, "n_train": len(train), "n_test": len(test), "width": WIDTH, "recipe": arm,
        "batch_size": row.batch_size, "seed": seed, "epochs": epochs,
    }  # fmt: skip
    about |= {"device": runs.hardware(PLACE.device), "threads": 1} | runs.stamp()
    files.write_csv(path, pd.DataFrame([about | each for each in rows]))
    with capsys.disabled():
        print(f"\n{name}, {arm}, seed {seed}: {rows[-1]}")


@pytest.mark.bench
def test_the_table_and_its_picture():
    """Whatever was measured, into one table, and the curves of the photographs."""
    table = pd.concat([pd.read_csv(path) for path in sorted(OUT.glob("*-*.csv"))], ignore_index=True)
    files.write_csv(OUT / "ssl_recipes_cpu.csv", table)
    figures.style()
    figure, axes = plt.subplots(1, table["dataset"].nunique(), figsize=(13, 4.5), squeeze=False)
    for ax, (name, rows) in zip(axes[0], table.groupby("dataset"), strict=True):
        series = {}
        for arm, each in rows.groupby("recipe"):
            curves = [c for _, c in each.groupby("seed")]
            length = min(map(len, curves))
            knn = np.stack([c["knn"].to_numpy()[-length:] for c in curves])
            minutes = np.mean([c["minutes"].to_numpy()[-length:] for c in curves], 0)
            if length == 1:  # the untrained network stays as it is
                minutes, knn = [0, rows["minutes"].max()], knn.repeat(2, 1)
            series[arm] = minutes, knn
        figures.lines(ax, series, "minutes of one thread", "kNN accuracy on clean test labels, %", percent=True)
        ax.set_title(f"{name}, {rows['n_train'].iloc[0]:,} images")
    figure.savefig(OUT / "ssl_recipes_cpu.png", bbox_inches="tight", dpi=100)
