"""Pre-training on a GPU at full size, how fast and how good: `make gpu`. Leaves runs/gpu.

CIFAR-10 is torchvision's copy in PTGLAB_DATA, or the parquet folder that PTGLAB_CIFAR10 names.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import speed
import torch

from ptglab import data
from ptglab.lab import metrics, runs
from ptglab.train import backbones, engine, finetune, predict, pretrain

OUT = Path("runs/gpu")
BATCH, WIDTH, N = 512, 64, 50_000
CIFAR10 = os.environ.get("PTGLAB_CIFAR10", "cifar10")
EPOCHS = int(os.environ.get("PTGLAB_EPOCHS", 200))

METHODS = ["simclr", "barlow_twins"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
pytestmark = [pytest.mark.bench, pytest.mark.gpu, needs_gpu, pytest.mark.parametrize("method", METHODS)]


def keep(name: str, row: dict, capsys) -> None:
    """Append a row to the table `name`, and print it."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.csv"
    row |= {"device": runs.hardware(engine.place().device)} | runs.stamp()
    pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)
    with capsys.disabled():
        print("\n" + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def test_an_epoch_beside_a_loader_of_all_cores(method, capsys):
    comparison = speed.ssl_epoch("torchvision", N, width=WIDTH, batch_size=BATCH, method=method)
    measured = speed.measure(comparison, rounds=2)
    row = {"method": method, "batch_size": BATCH, "cores": engine.threads(), "work": comparison.work}
    keep("speed_gpu", row | measured | {"peer_is": speed.installed("torchvision")}, capsys)
    assert measured["ours"] <= 1.5 and measured["ratio"] >= 10


def test_quality(method, capsys):
    """kNN and linear accuracy on clean labels; the run folder is one that notebook 9 takes as `pretrain_run`."""
    train, test = data.load(CIFAR10), data.load(CIFAR10, "test")
    run = runs.start(OUT / f"{method}-{EPOCHS}", method=method, dataset=CIFAR10, width=WIDTH, epochs=EPOCHS,
                     batch_size=BATCH, seed=0)  # fmt: skip
    network = backbones.build("resnet18", WIDTH, train.images, 0)
    torch.cuda.reset_peak_memory_stats()
    run.follow(pretrain.train(network, train.images, method, epochs=EPOCHS, batch_size=BATCH), method, EPOCHS)
    memory = torch.cuda.max_memory_allocated() / 2**30
    backbones.save(run.weights, network)
    run.finish()
    bank, queries = (predict.features(network, images) for images in (train.images, test.images))
    truth = train.labels_true if train.labels_true is not None else train.labels_given
    knn = {f"knn_{k}": metrics.knn_accuracy(bank, truth, queries, test.labels_given, k) for k in (20, 200)}
    seconds = run.records()["seconds"]
    head, tested = backbones.head(network.num_features, 10), (torch.from_numpy(queries), test.labels_given)
    options = {"mode": "linear", "epochs": 50, "batch_size": 256, "validation": 0, "test": tested}
    steps = finetune.train(torch.nn.Identity(), head, torch.from_numpy(bank), truth, **options)
    linear = pd.DataFrame(steps)["accuracy_test"].iloc[-1]
    row = {"method": method, "epochs": EPOCHS, "batch_size": BATCH, "seed": 0, **knn, "linear": float(linear)}
    times = {"minutes": seconds.sum() / 60, "seconds_an_epoch": float(np.median(seconds)), "peak_gib": memory}
    keep("ssl_quality", row | times, capsys)
    if EPOCHS == 200:
        assert knn["knn_200"] >= 0.78 and times["minutes"] <= 5
