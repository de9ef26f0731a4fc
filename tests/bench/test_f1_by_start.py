"""Wrong labels found, by what describes the images: `make starts`. Prints and keeps what it measures, and goes on.

Sets: 5,000 images of CIFAR-10 with human labels (PTGLAB_CIFAR10N, see test_detection), ten classes of Tiny ImageNet
(PTGLAB_TINY_IMAGENET, a parquet file), digits, generated stripes and 400 of the CIFAR-10 images with uniform noise. The
row of DINOv2 stays open where its weights cannot be had. Leaves runs/starts and figures/starts.csv.
"""

import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_detection import cleanlabs

from ptglab import data
from ptglab.audit import stages
from ptglab.data import noise
from ptglab.detect import label_errors, neighbours
from ptglab.errors import InputError
from ptglab.lab import metrics, runs
from ptglab.train import backbones, engine, patches, predict, starts

OUT = Path("runs/starts")
DETECTORS = ("ensemble", "disagreement", "confident_learning")
STARTS = ("pixels", "untrained", "patches", "lite0 128", "lite0 192", "lite0 224", "dinov2 224")
TOGETHER = ("patches", "lite0 192")
pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]


def noisy(images: data.ImageSet, rate: float) -> tuple[data.ImageSet, np.ndarray, np.ndarray]:
    true = images.labels_given
    return images, noise.apply("uniform", true, rate, images.num_classes, 0), true


def stripes(n: int = 2000) -> data.ImageSet:
    """Return noisy grey images [N, 1, 64, 64] of eight classes: four directions of waves, fine and coarse."""
    rng, (y, x) = np.random.default_rng(5), np.mgrid[:64, :64]
    labels = rng.integers(0, 8, n)
    angle = labels % 4 * np.pi / 4 + rng.normal(0, 0.18, n)
    length = np.where(labels < 4, 12, 6) * np.exp(rng.normal(0, 0.18, n))
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    waves = np.sin(2 * np.pi * (along / length[:, None, None] + rng.random((n, 1, 1))))
    pixels = (128 + 30 * waves + rng.normal(0, 45, waves.shape)).clip(0, 255).astype(np.uint8)
    names = [str(k) for k in range(8)]
    return data.ImageSet(torch.from_numpy(pixels[:, None]), labels, None, names, [str(i) for i in range(n)])


def sets():
    """Yield (name, images, given, true) of every set that is here."""
    yield "digits, 20 % uniform", *noisy(data.load("digits"), 0.2)
    yield "stripes, 20 % uniform", *noisy(stripes(), 0.2)
    if tiny := os.environ.get("PTGLAB_TINY_IMAGENET"):
        every = data.load(tiny)
        rng = np.random.default_rng(0)
        classes = rng.choice(200, 10, replace=False)
        rows = [rng.choice(np.flatnonzero(every.labels_given == k), 400, replace=False) for k in classes]
        few = every.take(np.sort(np.concatenate(rows)))
        number = np.unique(few.labels_given, return_inverse=True)[1]
        few = data.ImageSet(few.images, number, None, [str(k) for k in range(10)], few.ids)
        yield "Tiny ImageNet, 10 classes, 25 % uniform", *noisy(few, 0.25)
    try:
        source = os.environ.get("PTGLAB_CIFAR10N", "cifar10")
        for column in ("label_random1", "label_worse", "label_aggre"):
            images = data.load(source, labels=column).subset(5000, seed=0)
            yield f"CIFAR-10, {column[6:]}", images, images.labels_given, images.labels_true
        few = images.subset(400, seed=3)
        few = data.ImageSet(few.images, few.labels_true, None, few.class_names, few.ids)
        yield "CIFAR-10, 400 images, 10 % uniform", *noisy(few, 0.1)
    except InputError as error:
        print(f"CIFAR-10N is not here: {error}")


def described(start: str, images: data.ImageSet, place: engine.Place) -> np.ndarray:
    """Return features as the audit has them: at most 256 principal components of a variance of 1 in all."""
    name, _, size = start.partition(" ")
    network = {
        "untrained": lambda: backbones.build("resnet18", 16, images.images, 0),
        "patches": lambda: patches.learn(stages.shrunk(images.images), 0, place),
    }.get(name, lambda: starts.load(name, int(size)))
    raw = (images.images.flatten(1).numpy() / np.float32(255) if name == "pixels"
           else stages.described(network(), images, images.images, place))  # fmt: skip
    mean, directions = predict.principal(raw, stages.DIRECTIONS)
    into = np.empty((len(raw), directions.shape[1]), np.float32)
    predict.projected(raw, mean, directions, into)
    return into


def kept(name: str, start: str, images: data.ImageSet, place: engine.Place) -> tuple[np.ndarray, float]:
    """Return (features, the seconds that they took), from an earlier run if there was one."""
    path = OUT / f"{name}, {start}.npz".replace(" %", "")
    if not path.exists():
        clock = time.perf_counter()
        x = described(start, images, place)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, features=x, seconds=time.perf_counter() - clock)
    stored = np.load(path)
    return stored["features"], float(stored["seconds"])


def loss(x: np.ndarray, given: np.ndarray, k: int) -> float:
    probs = predict.out_of_fold(x, given, k)
    return -np.log(probs[np.arange(len(given)), given].clip(1e-9)).mean()


def judged(x: np.ndarray, given: np.ndarray, wrong: np.ndarray, k: int, beside: bool) -> list[dict]:
    probs, nearest = predict.out_of_fold(x, given, k, repeats=4), neighbours.nearest(x, 20)
    inputs = {"probs": probs, "features": x, "neighbours": nearest}
    found = {(name, "ptglab"): label_errors.detect(name, given, **inputs) for name in DETECTORS}
    if beside:
        found |= {(rule, "cleanlab"): each for rule, each in cleanlabs(x, given).items()}
    return [{"detector": name, "by": by} | metrics.detection(each, wrong) for (name, by), each in found.items()]


def test_f1_by_start(capsys):
    place, rows = engine.prepare("cpu"), []
    for name, images, given, true in sets():
        wrong, k, blocks, took = given != true, images.num_classes, {}, {}
        about = {"set": name, "n": len(images), "effective_rate": wrong.mean()}
        same = "CIFAR-10, 5000 images" if len(images) == 5000 else name
        for start in STARTS:
            try:
                blocks[start], took[start] = kept(same, start, images, place)
            except InputError as error:
                print(f"{start} is left open: {error}")
        blocks["together"] = np.concatenate([blocks[start] for start in TOGETHER], 1)
        chosen = min([*TOGETHER, "together"], key=lambda start: loss(blocks[start], given, k))
        for start, x in (blocks | {"auto": blocks[chosen]}).items():
            beside = start in TOGETHER
            seconds = took.get(start) or sum(took[each] for each in TOGETHER)
            about["chosen"] = chosen if start == "auto" else ""
            rows += [about | {"start": start, "seconds": seconds} | row for row in judged(x, given, wrong, k, beside)]
        table = pd.DataFrame(rows).assign(**runs.stamp())
        table.to_csv(OUT / "starts.csv", index=False)
    ours = table[(table["by"] == "ptglab") & (table["detector"] == "ensemble")]
    with capsys.disabled():
        for measure in ("f1", "average_precision"):
            print(f"\n{measure} of the ensemble")
            print(ours.pivot_table(measure, "set", "start", sort=False).round(3).to_string())
        print(table[table["start"] == "auto"].groupby("set", sort=False)["chosen"].first().to_string())
    wide = ours.pivot_table("average_precision", "set", "start")
    assert (wide["auto"] >= wide[list(TOGETHER)].max(axis=1) - 0.02).all(), wide.round(3).to_string()
