"""The stages of an audit, which notebook 6 and `audit.run` share, and its choices: budget, start, what is flagged.

A stage is a folder of the run folder. What it has finished is read from there, and what was interrupted is resumed.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ptglab import data, files
from ptglab.audit import exports
from ptglab.data.decode import allocate
from ptglab.detect import duplicates, label_errors, neighbours, noise_rate, suspects
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError, one_of
from ptglab.lab import runs
from ptglab.train import augment, backbones, engine, finetune, patches, predict
from ptglab.train import pretrain as pretraining

NOTEBOOK = "06_audit_your_images"
CHANGEABLE = ("detector", "flag")  # parameters with which a finished audit may be run again
FEWEST = 10  # images that can be judged at all
FEWEST_EPOCHS = 5  # of pre-training that are worth it
HISTORY = 30  # epochs over which a linear head is followed
NEIGHBOURS = 20  # of each image that are searched for
METHODS = ["auto", "patches", *pretraining.METHODS]


@dataclass(frozen=True)
class Budget:
    """A row of BUDGETS: what an audit may spend."""

    method: str  # of pre-training from nothing
    width: int  # of a backbone that starts from nothing
    largest: int  # pixels a side; larger images are shrunk to that
    work: float  # images seen in pre-training, if they have 32 pixels a side and the backbone a width of 16
    most_epochs: int
    repeats: int  # splits into folds, over which the probabilities are averaged
    tuned_epochs: int = 0  # of fine-tuned folds; 0: linear heads on frozen features


BUDGETS = {
    "quick": Budget("patches", 16, 64, 1e5, 60, 4),
    "standard": Budget("simclr", 32, 128, 1e6, 200, 10),
    "thorough": Budget("simclr", 64, 224, 1e7, 800, 10, 10),
}


def plan(budget: str, detector: str, flag: str) -> Budget:
    """Return the budget of that name. Raises InputError for an unknown budget, detector or way to flag."""
    one_of("detector", detector, label_errors.DETECTORS)
    if flag not in ("own", "rate") and not flag.isdecimal():
        raise InputError(f"flag is '{flag}': it must be own, rate, or how many labels to flag")
    return BUDGETS[one_of("budget", budget, BUDGETS)]


@contextmanager
def refusal_leaves_nothing(out: str | Path) -> Iterator[None]:
    """Delete the folder `out` if the block raises InputError before any work was done.

    Not if it was there before, or if another process is at work there.
    """
    was_there = os.path.lexists(out)
    try:
        yield
    except InputError:
        if not was_there and os.path.isdir(out) and not Path(out, "pretrain").exists():
            with suppress(InputError), files.lock(Path(out), "process", shared=True):
                shutil.rmtree(out, ignore_errors=True)
        raise


def load(run: runs.Run, source: str, labels: str, image_size: int, budget: Budget) -> tuple[data.ImageSet, Tensor]:
    """Return (the images with their labels, their pixels as they are learned from, uint8 [N, C, H, W]).

    Leaves unreadable.csv and the fingerprint in the folder of `run`. Raises InputError for images that cannot be
    loaded or audited, and for others than those the folder was begun with.
    """
    images = data.load(source, labels=labels, image_size=image_size or None, at_most=budget.largest)
    if len(images) < FEWEST:
        raise InputError(
            f"an audit compares images with each other and needs {FEWEST} at least; {len(images)} are readable"
        )
    if len(np.unique(images.labels_given)) < 2:
        raise InputError("all images have the same label: there must be two classes at least for a label to be wrong")
    run.keep_fingerprint(images.fingerprint)
    exports.unreadable(run.path, images)
    return images, without_empty_colours(images.images)


def without_empty_colours(images: Tensor) -> Tensor:
    """Return uint8 images [N, C, H, W] as [N, 1, H, W] if their three colours are one: grey, kept as colour."""
    if images.shape[1] != 3:
        return images
    for block in images.split(4096):
        if (block[:, 1:].int() - block[:, :1]).abs().max() > 2:  # rounding of a grey JPEG
            return images
    grey = torch.from_numpy(allocate((len(images), 1, *images.shape[2:])))
    for block, into in zip(images.split(4096), grey.split(4096), strict=True):
        into.copy_(block[:, :1])
    return grey


def views(images: Tensor, flip: bool, dataset: str) -> dict[str, str]:
    """Return the augmentation preset of each method of pre-training, and of `weak`, for uint8 `images` [N, C, H, W].

    It is the method's own for coloured images, and otherwise the grey one. Without `flip`, nothing is mirrored.
    """
    coloured, variant = images.shape[1] == 3, "" if flip else "_unflipped"
    presets = {name: name if coloured else "grey" for name in pretraining.METHODS} | {"weak": "weak"}
    return {name: augment.for_dataset(preset + variant, dataset) for name, preset in presets.items()}


def start(
    name: str, method: str, budget: Budget, backbone: str, width: int, images: Tensor, seed: int
) -> tuple[backbones.ResNet | None, str, str]:
    """Return (network, what it begins with, in words, how it is pre-trained) for uint8 `images` [N, C, H, W].

    name: `scratch`; `imagenet`, from torch's cache or the network; a file of weights, ours or torchvision's; or
    `auto`: for colour images `imagenet` where such weights can be had, and otherwise `scratch`. ImageNet weights have
    a width of 64. method: one of METHODS, or `auto`, the budget's from nothing and `simclr` from weights. There is no
    network (None) for patches. Raises InputError for a start that is not there, and for patches with weights.
    """
    one_of("method", method, METHODS)
    trained, why = "simclr" if method == "auto" else method, ""
    if name == "auto" and images.shape[1] == 3 and method != "patches":
        try:
            return backbones.imagenet(backbone, images), "ImageNet weights", trained
        except InputError as error:
            why = f" (there are {error})"
    if name in ("auto", "scratch"):
        method = budget.method if method == "auto" else method
        network = None if method == "patches" else backbones.build(backbone, width or budget.width, images, seed)
        return network, f"nothing{why}", method
    if method == "patches":
        raise InputError("patches learn from the images alone: leave start at auto, or choose another method")
    if name == "imagenet":
        return backbones.imagenet(backbone, images), "ImageNet weights", trained
    if not Path(name).is_file():
        one_of("start", name, ["auto", "scratch", "imagenet", "or a file of weights"])
    try:
        network, _ = backbones.load(name)
    except InputError:
        return backbones.imagenet(backbone, images, name), f"ImageNet weights in {name}", trained
    if network.sizes["channels"] != images.shape[1]:
        raise InputError(f"{name} is for images of {network.sizes['channels']} channels, not {images.shape[1]}")
    return network, name, trained


def epochs(asked: int, budget: Budget, images: Tensor, network: backbones.ResNet | None, began: str) -> int:
    """Return how many epochs `network` is pre-trained on uint8 `images` [N, C, H, W]: as many as `asked`, if not -1.

    Otherwise what `budget` buys: a network that began with nothing gets FEWEST_EPOCHS at least; one that began with
    weights gets none rather than fewer. There are none without a network.
    """
    if network is None or asked >= 0:
        return 0 if network is None else asked
    cost = (max(images.shape[2:]) / 32) ** 2 * (network.sizes["width"] / 16) ** 2
    bought = min(budget.most_epochs, math.ceil(budget.work / (cost * len(images))))
    return bought if bought >= FEWEST_EPOCHS else FEWEST_EPOCHS * began.startswith("nothing")


def pretrain(
    run: runs.Run, network: nn.Module | None, images: Tensor, labels: np.ndarray, method: str, epochs: int,
    batch_size: int, views: dict[str, str], seed: int, place: engine.Place,
) -> pd.DataFrame:  # fmt: skip
    """Pre-train `network`, if there is one, on uint8 `images` [N, C, H, W]; return the records, one per epoch.

    labels: the given ones, int64 [N], which are compared with the neighbours' and never learned from.
    """
    stage = run.stage("pretrain")
    if network is not None and not stage.done:
        if epochs:
            steps = pretraining.train(
                network, images, method, epochs=epochs, batch_size=batch_size, seed=seed, place=place,
                augmentation=views[method], schedule="short" if epochs < 200 else "full",
                projection=256 if place.device.type == "cpu" else None, labels_given=labels,
                checkpoint=stage.checkpoint,
            )  # fmt: skip
            stage.follow(steps, f"pre-train {method}", epochs)
        backbones.save(stage.weights, network)
        stage.finish()
    return stage.records()


def features(run: runs.Run, network: nn.Module | None, images: Tensor, seed: int, place: engine.Place) -> np.ndarray:
    """Return features, float32 [N, D], mapped from disk: of the pre-trained network, or of patches without one."""
    stage = run.stage("features")
    if not stage.done:
        if network is not None:
            network, _ = backbones.load(run.stage("pretrain").weights)
        else:
            network = patches.learn(images, seed, place)
            patches.save(stage.weights, network)
        predict.features(network, images, place, stage.growing_array("features", (len(images), network.num_features)))
        stage.finish()
    return stage.array("features")


def probabilities(
    run: runs.Run, network: nn.Module | None, budget: Budget, images: Tensor, features: np.ndarray,
    labels: np.ndarray, num_classes: int, views: dict[str, str], seed: int, place: engine.Place,
) -> np.ndarray:  # fmt: skip
    """Return out-of-fold probabilities, float32 [N, K], by linear heads on the features or by tuned networks."""
    stage = run.stage("probs")
    if not stage.done:
        if network is not None and budget.tuned_epochs:
            probs = np.empty((len(images), num_classes), np.float32)

            def tuned() -> tuple[nn.Module, nn.Module]:
                again, _ = backbones.load(run.stage("pretrain").weights)
                return again, backbones.head(again.num_features, num_classes)

            steps = finetune.cross_fit(
                tuned, images, labels, probs, mode="light", epochs=budget.tuned_epochs, folds=5, seed=seed,
                place=place, augmentation=views["weak"], checkpoint=stage.checkpoint,
            )  # fmt: skip
            stage.follow(steps, "tune five folds", 5 * budget.tuned_epochs)
        else:
            probs = predict.out_of_fold(features, labels, num_classes, repeats=budget.repeats, seed=seed)
        stage.save_array("probs", probs)
        stage.finish()
    return stage.array("probs")


def history(
    run: runs.Run, features: np.ndarray, labels: np.ndarray, num_classes: int, seed: int, place: engine.Place
) -> np.ndarray:
    """Return the margins, float32 [HISTORY, N], of a linear head while it learns the given labels, epoch by epoch."""
    stage = run.stage("history")
    if not stage.done:
        margins = stage.growing_array("history", (HISTORY, len(features)))
        head = backbones.head(features.shape[1], num_classes)
        steps = finetune.train(
            nn.Identity(), head, torch.tensor(features), labels, mode="linear", epochs=HISTORY, seed=seed,
            place=place, validation=0, history=margins,
        )  # fmt: skip
        stage.follow(steps, "follow a linear head", HISTORY)
        stage.finish()
    return stage.array("history")


def nearest(run: runs.Run, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (similarity float32, index int64), both [N, NEIGHBOURS], of the nearest images: one search for all."""
    stage = run.stage("neighbours")
    names = ("similarity", "index")
    if not stage.done:
        for name, array in zip(names, neighbours.nearest(features, NEIGHBOURS), strict=True):
            stage.save_array(name, array)
        stage.finish()
    return tuple(stage.array(name) for name in names)


def flag(found: Suspects, by: str, rate: float, labels: np.ndarray, belief: np.ndarray) -> Suspects:
    """Return `found` flagged `by` its own threshold ("own"), by the estimated `rate` of noise ("rate"), or by a number.

    labels: given, int64 [N]; belief: float [N, K], what suggestions are made from.
    """
    if by == "own":
        return found
    return suspects.flag(found, round(rate * len(labels)) if by == "rate" else int(by), labels, belief)


def odd_images(
    run: runs.Run, images: data.ImageSet, pixels: Tensor, nearest: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (near-duplicates int64 [P, 2], whether their labels conflict bool [P], which rows are outliers bool [N]).

    Writes duplicates.csv, the pairs with conflicting labels, and outliers.csv into the folder of `run`.
    """
    similarity, index = (array[:, :10] for array in nearest)
    pairs, difference = duplicates.duplicates(pixels, index)
    first, second = images.labels_given[pairs].T
    score, is_outlier = duplicates.outliers(similarity)
    conflicting = first != second
    exports.duplicates(run.path, images, pairs[conflicting], difference[conflicting])
    exports.outliers(run.path, images, score, is_outlier)
    return pairs, conflicting, is_outlier


def report(
    run: runs.Run, images: data.ImageSet, found: Suspects, source: str, rate: float,
    estimates: Iterable[noise_rate.NoiseRate], about: dict,
) -> None:  # fmt: skip
    """Write suspects.csv, gallery.html, summary.json and the files for labelling tools into the folder of `run`.

    rate: the ensemble's estimate of the noise rate; about: what else summary.json says, `detector` at least.
    """
    low, high = noise_rate.interval(rate, estimates, len(images))
    table = exports.table(images, found)
    confusions = table[table["flagged"]].value_counts(["given", "suggested"]).head(20)
    summary = {"images": len(images), "unreadable": len(images.unreadable), "flagged": int(found.flagged.sum()),
               "rate": float(rate), "low": low, "high": high,
               "confusions": [[*pair, number] for pair, number in confusions.items()]}  # fmt: skip
    exports.write(run.path, images, found, summary | about, source)
