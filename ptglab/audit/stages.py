"""An audit's choices: how much work a budget buys, where the backbone starts, which labels are flagged."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptglab.data.decode import allocate
from ptglab.detect import label_errors
from ptglab.detect.label_errors import Suspects
from ptglab.errors import InputError, one_of
from ptglab.train import backbones, pretrain

FEWEST = 10  # images that can be judged at all
FEWEST_EPOCHS = 5  # of pre-training that are worth it
METHODS = ["auto", "patches", *pretrain.METHODS]


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
    """Return the budget of that name. Raises InputError for another one, detector or flag."""
    one_of("detector", detector, label_errors.DETECTORS)
    if flag not in ("own", "rate") and not flag.isdecimal():
        raise InputError(f"flag is '{flag}': it must be own, rate, or how many labels to flag")
    return BUDGETS[one_of("budget", budget, BUDGETS)]


def check(labels: np.ndarray) -> None:
    """Raise InputError unless there are FEWEST images, in two classes, that an audit can say anything about."""
    if len(labels) < FEWEST:
        raise InputError(
            f"an audit compares images with each other and needs {FEWEST} at least; {len(labels)} are readable"
        )
    if len(np.unique(labels)) < 2:
        raise InputError("all images have the same label: there must be two classes at least for a label to be wrong")


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


def views(name: str, images: Tensor, flip: bool) -> str:
    """Return the augmentation preset for uint8 `images` [N, C, H, W]: `name` if they are coloured, else the grey one.

    Without `flip`, the variant that never mirrors. Weak views have no colours to leave out.
    """
    return (name if images.shape[1] == 3 or name == "weak" else "grey") + ("" if flip else "_unflipped")


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


def epochs(budget: Budget, images: Tensor, width: int, fresh: bool) -> int:
    """Return the epochs of pre-training that `budget` buys for uint8 `images` [N, C, H, W].

    A fresh network gets FEWEST_EPOCHS at least; one that begins with weights gets none rather than fewer.
    """
    cost = (max(images.shape[2:]) / 32) ** 2 * (width / 16) ** 2
    bought = min(budget.most_epochs, math.ceil(budget.work / (cost * len(images))))
    return bought if bought >= FEWEST_EPOCHS else FEWEST_EPOCHS * fresh


def flag(found: Suspects, by: str, rate: float, labels: np.ndarray, belief: np.ndarray) -> Suspects:
    """Return `found` flagged `by` its own threshold ("own"), by the estimated `rate` of noise ("rate"), or by a number.

    labels: given, int64 [N]; belief: float [N, K], what suggestions are made from.
    """
    if by == "own":
        return found
    count = round(rate * len(labels)) if by == "rate" else int(by)
    return label_errors.flag(found, count, labels, belief)


def confusions(given: np.ndarray, suspects: Suspects, class_names: list[str]) -> list[tuple[str, str, int]]:
    """Return (given, suggested, how many flagged), the most frequent first."""
    rows = np.flatnonzero(suspects.flagged)
    pairs = Counter(zip(given[rows].tolist(), suspects.suggested[rows].tolist(), strict=True))
    return [(class_names[a], class_names[b], number) for (a, b), number in pairs.most_common()]


def confusion_matrix(
    given: np.ndarray, suspects: Suspects, class_names: list[str], most: int = 20
) -> tuple[np.ndarray, list[str]]:
    """Return (flagged labels int64 [K, K], row given, column suggested; the K names): of `most` classes at most.

    With more classes than that, those which most flagged labels are given as or suggested for, in their order.
    """
    k, rows = len(class_names), np.flatnonzero(suspects.flagged)
    counts = np.bincount(given[rows] * k + suspects.suggested[rows], minlength=k * k).reshape(k, k)
    kept = np.sort(np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")[:most])
    return counts[np.ix_(kept, kept)], [class_names[i] for i in kept]
