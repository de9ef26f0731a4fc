"""The stages of an audit, which notebook 6 and `audit.run` share, and its choices: budget, start, what is flagged.

A stage is a folder of the run folder. What it has finished is read from there, and what was interrupted is resumed.
"""

import copy
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ptglab import data, files
from ptglab.audit import exports, update
from ptglab.data.decode import allocate, resized
from ptglab.detect import calibration, duplicates, label_errors, neighbours, noise_rate, suspects
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError, one_of
from ptglab.lab import runs
from ptglab.train import augment, backbones, checkpoints, engine, finetune, patches, predict, starts
from ptglab.train import pretrain as pretraining

NOTEBOOK = "06_audit_your_images"
READING = ("split", "table", "id_column", "labels", "image_size")  # parameters that say how images are loaded
CHANGEABLE = ("detector", "flag", "precision", "update")  # parameters with which a finished audit may be run again
FEWEST = 10  # images that can be judged at all
FEWEST_EPOCHS = 5  # of pre-training that are worth it
FIRST = 100  # suspects of which is said how many are likely to be wrong
HISTORY = 30  # epochs over which a linear head is followed
NEIGHBOURS = 20  # of each image that are searched for

AUTO = "patches+lite0"  # the default: no download, and never much worse than the better of the two
SIZES = {"lite0": 192}  # pixels a side at which a start looks at the images of an audit, if not its own size
PATCH_SIDE = 32  # pixels a side at which patches are learned: no worse than at 64, in a quarter of the time
DIRECTIONS = 256  # of the features of each network: no worse than all of them, in a fifth of the time


@dataclass(frozen=True)
class Budget:
    """A row of BUDGETS: what an audit may spend."""

    width: int  # of a backbone that starts from nothing
    largest: int  # pixels a side; larger images are shrunk to that
    work: float  # images seen in pre-training, if they have 32 pixels a side and the backbone a width of 16
    most_epochs: int
    repeats: int  # splits into folds, over which the probabilities are averaged
    tuned_epochs: int = 0  # of fine-tuned folds; 0: linear heads on frozen features


BUDGETS = {
    "quick": Budget(16, 64, 1e5, 60, 4),
    "standard": Budget(32, 128, 1e6, 200, 10),
    "thorough": Budget(64, 224, 1e7, 800, 10, 10),
}


def plan(budget: str, detector: str, flag: str, precision: float = 0.0) -> Budget:
    """Return the budget of that name. Raises InputError for an unknown budget, detector or way to flag."""
    one_of("detector", detector, label_errors.DETECTORS)
    if flag not in ("own", "rate") and not flag.isdecimal():
        raise InputError(f"flag is '{flag}': it must be own, rate, or how many labels to flag")
    if not 0 <= precision <= 1 or (precision and flag != "own"):
        raise InputError(f"precision is {precision} and flag is '{flag}': a precision lies between 0 and 1, and "
                         "decides alone, beside flag=own, how many labels are flagged")  # fmt: skip
    return BUDGETS[one_of("budget", budget, BUDGETS)]


@contextmanager
def refusal_leaves_nothing(out: str | Path) -> Iterator[None]:
    """Delete what a start left in the folder `out` if the block raises InputError, unless it was there before."""
    was_there = os.path.lexists(out)
    try:
        yield
    except InputError:
        if not was_there:
            runs.discard(out)
        raise


def timed(stage: Callable) -> Callable:
    """Return the function `stage`, which from then on adds how long it took to seconds.json in the folder of its run.

    A stage that was finished earlier takes no time, and what it took then is kept.
    """

    @functools.wraps(stage)
    def timed_stage(run: runs.Run, *arguments: object, **named: object) -> object:
        start = time.perf_counter()
        result = stage(run, *arguments, **named)
        took = seconds(run)
        took[stage.__name__] = max(took.get(stage.__name__, 0), round(time.perf_counter() - start, 1))
        files.write_json(run.path / "seconds.json", took)
        return result

    return timed_stage


def seconds(run: runs.Run) -> dict[str, float]:
    """Return {stage: how many seconds it took}."""
    path = run.path / "seconds.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


@timed
def load(
    run: runs.Run, source: str, budget: Budget, changed: bool = False, **reading: object
) -> tuple[data.ImageSet, Tensor]:
    """Return (the images with their labels, their pixels as they are learned from, uint8 [N, C, H, W]).

    changed: whether images may have come, gone or changed since the folder was begun; what is known of the others is
    then kept, see `update`. reading: what `data.load` is told beside the source; 0 and "" stand for its defaults.
    Leaves unreadable.csv and the fingerprint in the folder of `run`. Raises InputError for images that cannot be loaded
    or audited, and for others than those the folder was begun with, unless they may have `changed`.
    """
    images = data.load(source, at_most=budget.largest, **{name: value for name, value in reading.items() if value})
    if len(images) < FEWEST:
        raise InputError(
            f"an audit compares images with each other and needs {FEWEST} at least; {len(images)} are readable"
        )
    if len(np.unique(images.labels_given)) < 2:
        raise InputError("all images have the same label: there must be two classes at least for a label to be wrong")
    pixels = without_empty_colours(images.images)
    if changed:
        print(update.begin(run, images, pixels))
    else:
        run.keep_fingerprint(images.fingerprint)
    exports.unreadable(run.path, images)
    return images, pixels


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


def start(name: str, backbone: str, width: int, images: Tensor, seed: int) -> dict[str, nn.Module | None]:
    """Return {start: network}: what describes uint8 `images` [N, C, H, W]; None stands for patches, not yet learned.

    name: `patches`, learned from the images in a minute; `scratch`, a ResNet that knows nothing; `imagenet`, one with
    torchvision's weights, from torch's cache or the network; a file of weights, ours or torchvision's; what
    `starts.load` knows; several of these, joined by `+`, whose features stand side by side; or `auto`, which is AUTO.
    Raises InputError for a start that is not there or does not fit the images, and for two ResNets.
    """
    name = AUTO if name == "auto" else name
    parts = [name] if os.path.exists(name) else name.split("+")
    networks = {part: _network(part, backbone, width, images, seed) for part in parts}
    if len(networks) < len(parts) or sum(isinstance(each, backbones.ResNet) for each in networks.values()) > 1:
        raise InputError(f"start is '{name}': it may name each start once, and one network that learns")
    return networks


def _network(name: str, backbone: str, width: int, images: Tensor, seed: int) -> nn.Module | None:
    if name == "patches":
        return None
    if name == "scratch":
        return backbones.build(backbone, width, images, seed)
    if name == "imagenet":
        return backbones.imagenet(backbone, images)
    if not Path(name).is_file():
        if not (Path(name).is_dir() or name in starts.STARTS or name.startswith("timm:")):
            known = ["auto", "patches", "scratch", "imagenet", *starts.STARTS, "timm:NAME"]
            one_of("start", name, [*known, "or a file or folder of weights"])
        return starts.load(name, SIZES.get(name, 0))
    try:
        network, _ = backbones.load(name)
    except InputError:
        return backbones.imagenet(backbone, images, name)
    if network.sizes["channels"] != images.shape[1]:
        raise InputError(f"{name} is for images of {network.sizes['channels']} channels, not {images.shape[1]}")
    return network


def learner(networks: dict[str, nn.Module | None]) -> tuple[str, nn.Module | None]:
    """Return (start, network) of the one of `networks` that can be pre-trained on the images, ("", None) without one.

    It is the ResNet, or else a network that others have trained.
    """
    found = [(name, network) for name, network in networks.items() if network is not None]
    return min(found, key=lambda pair: not isinstance(pair[1], backbones.ResNet), default=("", None))


def epochs(asked: int, budget: Budget, images: Tensor, networks: dict[str, nn.Module | None]) -> int:
    """Return how many epochs the `learner` of `networks` is pre-trained on uint8 `images` [N, C, H, W].

    As many as `asked`, if not -1. Otherwise what `budget` buys for a ResNet: one that began with nothing gets
    FEWEST_EPOCHS at least, one that began with weights gets none rather than fewer. Others stay as they are.
    """
    name, network = learner(networks)
    if network is None or asked >= 0:
        return 0 if network is None else asked
    if not isinstance(network, backbones.ResNet):
        return 0
    cost = (max(images.shape[2:]) / 32) ** 2 * (network.sizes["width"] / 16) ** 2
    bought = min(budget.most_epochs, math.ceil(budget.work / (cost * len(images))))
    return bought if bought >= FEWEST_EPOCHS else FEWEST_EPOCHS * (name == "scratch")


@timed
def pretrain(
    run: runs.Run, networks: dict[str, nn.Module | None], images: Tensor, labels: np.ndarray, method: str, epochs: int,
    batch_size: int, views: dict[str, str], seed: int, place: engine.Place,
) -> pd.DataFrame:  # fmt: skip
    """Pre-train the `learner` of `networks` on uint8 `images` [N, C, H, W]; return the records, one per epoch.

    labels: the given ones, int64 [N], which are compared with the neighbours' and never learned from.
    """
    stage, (_, network) = run.stage("pretrain"), learner(networks)
    if network is not None and epochs and not stage.done:
        steps = pretraining.train(
            network, images, method, epochs=epochs, batch_size=batch_size, seed=seed, place=place,
            augmentation=views[method], schedule="short" if epochs < 200 else "full",
            projection=256 if place.device.type == "cpu" else None, labels_given=labels, checkpoint=stage.checkpoint,
        )  # fmt: skip
        stage.follow(steps, f"pre-train {method}", epochs)
        backbones.save(stage.weights, network)  # a start for other audits, if it is a ResNet
        stage.finish()
    return stage.records()


@timed
def features(
    run: runs.Run, networks: dict[str, nn.Module | None], images: data.ImageSet, pixels: Tensor, seed: int,
    place: engine.Place, choose: bool,
) -> tuple[np.ndarray, str]:  # fmt: skip
    """Return (features float32 [N, D], mapped from disk; the starts that they come from, joined by `+`).

    Each network's are projected on their DIRECTIONS principal directions and scaled to a variance of 1 in all, so that
    networks count alike side by side. choose: take those of one network alone if its linear heads, out of fold, give
    the given labels a greater likelihood than the heads on all of them: no truth is needed for that.
    """
    stage = run.stage("features")
    if not stage.done:
        before, listed = runs.Run(run.path / "before"), update.listed(images, pixels)
        raw, blocks, n = [], {}, len(images)
        known = update.known(before, listed)
        kept, rest = np.flatnonzero(known >= 0), np.flatnonzero(known < 0)
        if "patches" in networks:
            learned = patches.load(before.weights) if len(kept) else patches.learn(shrunk(pixels), seed, place)
            patches.save(stage.weights, learned)
        for i, (name, network) in enumerate(trained(run, networks).items()):
            raw.append(stage.growing_array(f"raw{i}", (n, network.num_features)))
            if len(kept):
                raw[i][kept] = before.array(f"raw{i}")[known[kept]]
                if len(rest):
                    raw[i][rest] = described(network, images.take(rest), pixels[rest], place)
            else:
                described(network, images, pixels, place, raw[i])
            mean, directions = predict.principal(raw[i], DIRECTIONS)
            stage.save_array(f"mean{i}", mean)
            stage.save_array(f"directions{i}", directions)
            first = max((columns.stop for columns in blocks.values()), default=0)
            blocks[name] = slice(first, first + directions.shape[1])
        side_by_side = stage.growing_array("side_by_side", (n, blocks[name].stop))
        for i, columns in enumerate(blocks.values()):
            predict.projected(raw[i], stage.array(f"mean{i}"), stage.array(f"directions{i}"), side_by_side[:, columns])
        chosen = slice(0, blocks[name].stop)
        if choose and len(blocks) > 1:
            chosen = min([chosen, *blocks.values()], key=lambda columns: _loss(side_by_side[:, columns], images, seed))
        stage.save_array("features", side_by_side[:, chosen])
        names = [name for name, columns in blocks.items() if chosen.start <= columns.start < chosen.stop]
        (stage.path / "arrays" / "side_by_side.npy").unlink()
        files.write_json(stage.path / "starts.json", names)
        exports.write_table(stage.path / "images.csv", listed)
        stage.finish()
        shutil.rmtree(before.path, ignore_errors=True)
    return stage.array("features"), "+".join(json.loads((stage.path / "starts.json").read_text()))


def features_of(run: runs.Run, images: data.ImageSet, pixels: Tensor, place: engine.Place) -> np.ndarray:
    """Return features, float32 [M, D], of other images by the networks of an audit that is finished.

    pixels: uint8 [M, C, H, W], with as many channels as those that were audited.
    """
    params, stage, blocks = run.params, run.stage("features"), []
    budget, seed = BUDGETS[params["budget"]], params["seed"]
    networks = start(params["start"], params["backbone"], params["width"] or budget.width, pixels, seed)
    used = json.loads((stage.path / "starts.json").read_text())
    for i, (name, network) in enumerate(trained(run, networks).items()):
        if name in used:
            mean, directions = stage.array(f"mean{i}"), stage.array(f"directions{i}")
            blocks.append(np.empty((len(images), directions.shape[1]), np.float32))
            predict.projected(described(network, images, pixels, place), mean, directions, blocks[-1])
    return np.concatenate(blocks, 1)


def _loss(features: np.ndarray, images: data.ImageSet, seed: int) -> float:
    """Return the mean of -log p of the given labels under linear heads that did not see them."""
    given = images.labels_given
    probs = predict.out_of_fold(features, given, images.num_classes, seed=seed)
    return -np.log(probs[np.arange(len(given)), given].clip(1e-9)).mean()


def trained(run: runs.Run, networks: dict[str, nn.Module | None]) -> dict[str, nn.Module]:
    """Return `networks` as they are after the stages `pretrain` and, for patches, `features`."""
    _, network = learner(networks)
    if (weights := runs.Run(run.path / "pretrain").weights).exists():
        tensors = checkpoints.read_tensors(weights)[0].items()
        network.load_state_dict({name.removeprefix("backbone."): each for name, each in tensors}, strict=True)
    return {name: network or patches.load(run.stage("features").weights) for name, network in networks.items()}


def described(
    network: nn.Module, images: data.ImageSet, pixels: Tensor, place: engine.Place, into: np.ndarray | None = None
) -> np.ndarray:
    """Return the features that `network` has of `images`, float32 [N, D]; the array `into` is filled, if given.

    A network that others have trained sees the original images at its own size, streamed; ours see uint8 `pixels`
    [N, C, H, W], and patches see them shrunk.
    """
    if isinstance(network, starts.Pretrained):
        batches = images.batches(network.size, interpolation=network.interpolation)
        return predict.features(network, batches, place, np.empty((len(images), network.num_features), np.float32)
                                if into is None else into)  # fmt: skip
    return predict.features(network, shrunk(pixels) if isinstance(network, patches.Patches) else pixels, place, into)


def shrunk(pixels: Tensor) -> Tensor:
    """Return uint8 images [N, C, H, W] at the size at which patches are learned."""
    side = max(pixels.shape[2:])
    return resized(pixels, PATCH_SIDE) if side > PATCH_SIDE else pixels


@timed
def probabilities(
    run: runs.Run, networks: dict[str, nn.Module | None], budget: Budget, images: Tensor, features: np.ndarray,
    labels: np.ndarray, num_classes: int, views: dict[str, str], seed: int, place: engine.Place,
) -> np.ndarray:  # fmt: skip
    """Return out-of-fold probabilities, float32 [N, K], by linear heads on the features or by tuned networks."""
    stage, (_, network) = run.stage("probs"), learner(networks)
    if not stage.done:
        if network is not None and budget.tuned_epochs:
            trained(run, networks)
            probs = np.empty((len(images), num_classes), np.float32)

            def tuned() -> tuple[nn.Module, nn.Module]:
                return copy.deepcopy(network), backbones.head(network.num_features, num_classes)

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


@timed
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


@timed
def nearest(run: runs.Run, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (similarity float32, index int64), both [N, NEIGHBOURS], of the nearest images: one search for all."""
    stage = run.stage("neighbours")
    names = ("similarity", "index")
    if not stage.done:
        for name, array in zip(names, neighbours.nearest(features, NEIGHBOURS), strict=True):
            stage.save_array(name, array)
        stage.finish()
    return tuple(stage.array(name) for name in names)


def flag(
    found: Suspects, by: str, precision: float, rate: float, likely: np.ndarray, labels: np.ndarray, belief: np.ndarray
) -> Suspects:
    """Return `found` flagged `by` its own threshold ("own"), by the estimated `rate` of noise ("rate"), or by a number.

    With a `precision`, as many are flagged as are expected to be wrong with it. likely: the probability that each label
    is wrong, [N]; labels: given, int64 [N]; belief: float [N, K], what suggestions are made from.
    """
    if precision:
        return calibration.flag_by_precision(found, likely, precision, labels, belief)
    if by == "own":
        return found
    return suspects.flag(found, round(rate * len(labels)) if by == "rate" else int(by), labels, belief)


@timed
def odd_images(
    run: runs.Run, images: data.ImageSet, pixels: Tensor, nearest: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (near-duplicates int64 [P, 2], whether their labels conflict bool [P], which rows are outliers bool [N]).

    Blank images, of one colour, are outliers. Writes duplicates.csv and outliers.csv into the folder of `run`.
    """
    similarity, index = (array[:, :10] for array in nearest)
    pairs, difference = duplicates.duplicates(pixels, index)
    first, second = images.labels_given[pairs].T
    score, is_outlier = duplicates.outliers(similarity)
    is_outlier = is_outlier | images.blank
    exports.duplicates(run.path, images, pairs, difference)
    exports.outliers(run.path, images, score, is_outlier)
    return pairs, first != second, is_outlier


def report(
    run: runs.Run, images: data.ImageSet, found: Suspects, source: str, rate: float,
    estimates: Iterable[noise_rate.NoiseRate], likely: np.ndarray, probs: np.ndarray, unknown: str, about: dict,
) -> dict:  # fmt: skip
    """Write suspects.csv, gallery.html, summary.json and the files for labelling tools into the folder of `run`.

    rate: the ensemble's estimate of the noise rate; likely: the probability that each label is wrong, [N]; unknown: see
    `calibration.knowledge`: if it says something, no share of wrong labels is claimed; about: what else summary.json
    says, `detector` at least. Returns the summary.
    """
    low, high = noise_rate.interval(rate, estimates, len(images))
    number = min(FIRST, len(images))
    expected = calibration.first(likely, number)
    table = exports.table(images, found)
    confusions = table[table["flagged"]].value_counts(["given", "suggested"]).head(20)
    summary = {"images": len(images), "unreadable": len(images.unreadable), "flagged": int(found.flagged.sum()),
               "unknown": unknown, "rate": None if unknown else float(rate), "low": low, "high": high,
               "first": None if unknown else [number, *expected], "seconds": seconds(run), "notes": list(images.notes),
               "confusions": [[*pair, number] for pair, number in confusions.items()],
               "better": "" if "dinov2" in run.params["start"] else starts.better()}  # fmt: skip
    suggested = probs[np.arange(len(probs)), found.suggested]
    exports.write(run.path, images, found, summary | about, source, suggested)
    return summary
