"""The control arms of README's table: `make controls` prints and keeps heads on an untrained network and on pixels.

The noise, the head, the optimiser and the epochs are those of `make demo`, so that what pre-training adds can be told
from what not training the backbone gives. Leaves runs/controls.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptglab import data
from ptglab.data import noise
from ptglab.detect import label_errors
from ptglab.lab import metrics, runs
from ptglab.train import backbones, engine, finetune, predict

OUT = Path("runs/controls")
RATE, SEEDS, EPOCHS, BATCH, WIDTH = 0.4, 3, 30, 64, 16  # of notebooks/00_quickstart
SHOWN = ["accuracy_last", "accuracy_best", "accuracy_selected", "f1", "balanced_accuracy"]


def untrained(images: Tensor, like: Tensor, seed: int, place: engine.Place) -> np.ndarray:
    """Return features of `images` by a network for images `like` these, which has never been trained."""
    return predict.features(backbones.build("resnet18", WIDTH, like, seed), images, place)


def pixels(images: Tensor, *_) -> np.ndarray:
    """Return the pixels [N, 64], averaged back to the 8 x 8 that the digits come in."""
    return F.avg_pool2d(images.float() / 255, 2).flatten(1).numpy()


@pytest.mark.bench
def test_controls(capsys):
    train, test, place, rows = data.load("digits"), data.load("digits", "test"), engine.prepare("cpu"), []
    for seed in range(SEEDS):
        given = noise.apply("uniform", train.labels_given, RATE, train.num_classes, seed)
        wrong = given != train.labels_given
        for init, look in {"random": untrained, "pixels": pixels}.items():
            features, tests = (look(each.images, train.images, seed, place) for each in (train, test))
            head = backbones.head(features.shape[1], train.num_classes)
            steps = finetune.train(
                nn.Identity(), head, torch.from_numpy(features), given, mode="linear", epochs=EPOCHS, seed=seed,
                batch_size=BATCH, place=place, test=(torch.from_numpy(tests), test.labels_given),
            )  # fmt: skip
            about = {
                "dataset": "digits", "n_train": len(train), "backbone": f"resnet18 width {WIDTH}" * (init == "random"),
                "init": init, "mode": "linear", "noise": "uniform", "noise_rate": RATE,
                "effective_rate": noise.effective_rate(train.labels_given, given), "seed": seed,
                **metrics.accuracies(pd.DataFrame(list(steps))),
            }  # fmt: skip
            probs = predict.out_of_fold(features, given, train.num_classes, seed=seed)
            for detector in ("confidence", "ensemble"):
                found = label_errors.detect(detector, given, probs, features, seed=seed)
                measured_on = {"device": runs.hardware(place.device), **runs.stamp()}
                rows.append(about | {"detector": detector} | metrics.detection(found, wrong) | measured_on)
    table = pd.DataFrame(rows)
    OUT.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUT / "digits_controls.csv", index=False)
    with capsys.disabled():
        print(f"\npercent, mean and sample deviation over {SEEDS} seeds; kept in {OUT}")
        print((100 * table.groupby(["init", "detector"])[SHOWN].agg(["mean", "std"])).round(1).to_string())
    assert table.groupby("init")["accuracy_last"].mean().between(0.8, 0.95).all()  # far above chance, below SimCLR
