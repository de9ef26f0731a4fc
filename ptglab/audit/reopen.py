"""What an audit or a run found, opened again: images, labels, suspects by any detector, and learning from other labels.

A folder can be opened if its notebook left `suspects.csv` beside its parameters: 4, 6 (`ptglab audit`) and 9 do.
"""

import json
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ptglab import data
from ptglab.audit import exports
from ptglab.audit import stages as audit
from ptglab.audit.corrections import Corrections
from ptglab.detect import label_errors, noise_rate
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError
from ptglab.files import small_enough, write
from ptglab.lab import runs
from ptglab.text import unescape_formula
from ptglab.train import backbones, engine, patches, predict

MOST_COMPARED = 20_000  # rows up to which detectors that compare every image with every other one are offered
COLUMNS = ["id", "given", "suggested", "score", "flagged"]


class Findings:
    """What the run folder `folder` found in `images`, an ImageSet with the labels that were judged.

    suspects: those of `detector`, row by row; stored: the arrays that were kept, of probs, float32 [N, K], features,
    float32 [N, D], history, float32 [E, N]. source: what the images were loaded from.
    """

    def __init__(
        self, folder: Path, source: str, images: data.ImageSet, suspects: Suspects, detector: str, stored: dict
    ):
        self.folder, self.source, self.images, self.detector = Path(folder), source, images, detector
        self.stored, self._found = stored, {detector: suspects}

    @property
    def probs(self) -> np.ndarray | None:
        return self.stored.get("probs")

    @cached_property
    def params(self) -> dict:
        return runs.Run(self.folder).params

    @cached_property
    def told(self) -> dict:
        """What summary.json says; nothing where there is none."""
        with suppress(OSError, ValueError, TypeError):
            return dict(json.loads((self.folder / "summary.json").read_text(encoding="utf-8")))
        return {}

    @property
    def detectors(self) -> list[str]:
        """The detectors whose scores can be had from what is stored, the one that decided first."""
        names = []
        for name, needs in label_errors.DETECTORS.items():
            inputs = {*needs.needs, *needs.takes}
            there = set(needs.needs) <= self.stored.keys() and inputs & self.stored.keys()
            if there and len(self.images) >= needs.rows and ("features" not in inputs or self._few):
                names.append(name)
        return [self.detector, *(name for name in names if name != self.detector)]

    @property
    def _few(self) -> bool:
        return len(self.images) <= MOST_COMPARED

    def suspects(self, detector: str) -> Suspects:
        """Return what one of `detectors` suspects; computed at the first time, unless it is the one that decided."""
        if detector not in self._found:
            seed = self.params.get("seed", 0)
            given = self.images.labels_given
            self._found[detector] = label_errors.detect(detector, given, **self.stored, seed=seed)
        return self._found[detector]

    @property
    def _pixels(self) -> torch.Tensor:
        """The images as the network saw them."""
        return audit.without_empty_colours(self.images.images) if "budget" in self.params else self.images.images

    @cached_property
    def network(self) -> nn.Module | None:
        """What made the features, or a network that was trained there; None if neither is to be had."""
        for stage in ("pretrain", "supervised"):
            if runs.Run(self.folder / stage).weights.exists():
                return backbones.load(runs.Run(self.folder / stage).weights)[0]
        if self.told.get("method") == "patches":
            return patches.learn(self._pixels, self.params.get("seed", 0), engine.place("cpu"))
        return None

    @cached_property
    def features(self) -> np.ndarray:
        """The stored features, float32 [N, D], or those of `network`. Raises InputError if there are neither."""
        if "features" in self.stored:
            return self.stored["features"]
        if self.network is None:
            raise InputError(f"{self.folder} holds neither features nor a network: run its notebook again")
        return predict.features(self.network, self._pixels)

    @cached_property
    def test(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The features of the test images, float32 [T, D], and their labels; None without such images or a network."""
        if "test" not in data.splits(self.source) or self.network is None:
            return None
        test = data.load(self.source, "test", **_size(self.params))
        pixels = test.images[:, : self._pixels.shape[1]]
        return predict.features(self.network, pixels), test.labels_given

    def apply(self, corrections: Corrections, run: runs.Run) -> tuple[np.ndarray, np.ndarray]:
        """Write the mended labels into the folder of `run`, and return (labels int64 [N], which rows are kept).

        mended.csv has id and label, without the images that were dropped: beside a folder's images it is what
        `data.load` takes labels from. The stage `mended` is what notebook 1 leaves, a `data_run` for 2 to 4 unless
        images were dropped. Nothing else is changed. Raises InputError for corrections of another set.
        """
        images = self.images
        rows = {id: row for row, id in enumerate(images.ids)}
        labels, kept = corrections.applied(rows, images.labels_given, images.class_names)
        ids, names = np.array(images.ids, object)[kept], np.array(images.class_names, object)[labels[kept]]
        exports.write_csv(run.path / "mended.csv", pd.DataFrame({"id": ids, "label": names}))
        arrays = {"labels_given": labels[kept], "ids": ids.astype(str)}
        if images.labels_true is not None:
            arrays["labels_true"] = images.labels_true[kept]
        stage = run.stage("mended")
        for name, array in arrays.items():
            stage.save_array(name, array)
        params = {name: self.params.get(name) for name in ("labels", "subset", "seed")} | {"dataset": self.source}
        write(stage.path / "params.json", lambda path: path.write_text(json.dumps(params, indent=1) + "\n"))
        return labels, kept

    def learn(self, labels: np.ndarray, kept: np.ndarray | None = None) -> dict[str, float]:
        """Train linear heads on the features with `labels`, int64 [N], of the rows `kept`, by default all.

        Returns shares: `agree`, of the labels that out-of-fold heads would give; `right`, of those that are the truth,
        and `test`, of the test images that a head on all rows is right about, where that is known; and how many of the
        labels are wrong, by each way of noise_rate. Raises InputError if too little is left to learn from.
        """
        kept = np.ones(len(labels), bool) if kept is None else kept
        features, labels = np.asarray(self.features)[kept], labels[kept]
        classes, seed = self.images.num_classes, self.params.get("seed", 0)
        probs = predict.out_of_fold(features, labels, classes, repeats=4, seed=seed)
        predicted = probs.argmax(1)
        shares = {"agree": (predicted == labels).mean()}
        if self.images.labels_true is not None:
            shares["right"] = (predicted == self.images.labels_true[kept]).mean()
        if self.test is not None:
            weight, bias = predict.linear_heads(features, labels, classes)
            shares["test"] = ((self.test[0] @ weight[0] + bias[0]).argmax(1) == self.test[1]).mean()
        for method in noise_rate.METHODS if self._few else ["joint"]:
            shares[method] = noise_rate.estimate(labels, classes, probs, features, method, bootstrap=2).rate
        return {name: float(share) for name, share in shares.items()}


MEANING = {
    "test": "right about the test images",
    "right": "out of fold, right about these images",
    "agree": "out of fold, agrees with their labels",
    "joint": "estimated share of wrong labels, confident joint",
    "clusterability": "estimated share of wrong labels, neighbours",
}


def compared(before: dict[str, float], after: dict[str, float]) -> pd.DataFrame:
    """Return what `learn` found on the labels before and after mending, in words, in percent."""
    rows = [(MEANING[name], 100 * before[name], 100 * after[name]) for name in MEANING if name in before]
    return pd.DataFrame(rows, columns=["%", "before", "after"]).set_index("%").round(2)


def keep(run: runs.Run, images: data.ImageSet, suspects: Suspects, detector: str, method: str = "", **arrays) -> None:
    """Leave in the folder of `run` what `read` opens beside its parameters.

    images: with the labels that were judged; method: how the features were made, if by "patches"; arrays: probs,
    features or history, see Findings.
    """
    exports.write_csv(run.path / "suspects.csv", exports.table(images, suspects))
    told = json.dumps({"detector": detector, "method": method}) + "\n"
    write(run.path / "summary.json", lambda path: path.write_text(told))
    for name, array in arrays.items():
        run.save_array(name, array)


def read(folder: str | Path, dataset: str = "") -> Findings:
    """Open the folder that an audit or a run has left.

    dataset: where its images are now, if elsewhere than when it was made. Raises InputError, in one line, if there is
    no such run, if it left no suspects, or if the images or what is stored are not those it was made of.
    """
    run = runs.Run(folder)
    params = run.params
    path = run.path / "suspects.csv"
    if not path.is_file():
        raise InputError(f"{folder} holds no suspects.csv: audit images, or execute notebook 4, 6 or 9, and give its "
                         "run_dir")  # fmt: skip
    source = str(dataset or params.get("dataset", ""))
    images = data.load(source, labels=params.get("labels"), **_size(params))
    images = images.subset(params.get("subset", 0), params.get("seed", 0))
    known = run.path / "fingerprint.txt"
    if known.exists() and known.read_text(errors="replace").split()[:1] != [images.fingerprint]:
        raise InputError(f"{folder} was made of other images than are in {source} now: audit them again")
    given, suspects = _table(path, images)
    images = replace(images, labels_given=given)
    told = Findings(run.path, source, images, suspects, "", {}).told
    stored = {name: array for name in ("probs", "features", "history") if (array := _stored(run, name)) is not None}
    label_errors.check(given, **stored)
    detector = told.get("detector") or params.get("detector", "stored")
    return Findings(run.path, source, images, suspects, detector, stored)


def _size(params: dict) -> dict:
    """Return how large the images of a run are to be loaded."""
    budget = audit.BUDGETS.get(params.get("budget"))
    return {"image_size": params.get("image_size") or None, "at_most": budget.largest if budget else None}


def _stored(run: runs.Run, name: str) -> np.ndarray | None:
    """Return an array of the run, or of its stage of that name; None if there is none."""
    for stage in (run, runs.Run(run.path / name)):
        if (stage.path / "arrays" / f"{name}.npy").exists():
            return stage.array(name)
    return None


def _table(path: Path, images: data.ImageSet) -> tuple[np.ndarray, Suspects]:
    """Return (given labels int64 [N], suspects) of a suspects.csv, in the order of `images`."""
    try:
        table = pd.read_csv(small_enough(path), dtype=str, keep_default_na=False)[COLUMNS]
        ids, given, suggested = ([unescape_formula(text) for text in table[name]] for name in COLUMNS[:3])
        score = table["score"].to_numpy(np.float32)
        flagged = np.array([{"True": True, "False": False}[text] for text in table["flagged"]])
    except (ValueError, KeyError, pd.errors.ParserError) as error:
        raise InputError(f"{path} is no table of suspects ({' '.join(str(error).split())}): audit again") from None
    number = {name: i for i, name in enumerate(images.class_names)}
    try:
        columns = [np.array([number[name] for name in names], np.int64) for names in (given, suggested)]
    except KeyError as error:
        raise InputError(f"{path} names a class that the images do not have, {error}: audit again") from None
    row = {id: i for i, id in enumerate(ids)}
    if len(row) != len(ids) or row.keys() != set(images.ids):
        raise InputError(f"{path} lists other images than there are now: audit them again")
    order = np.array([row[id] for id in images.ids])
    given, suggested, score, flagged = (column[order] for column in (*columns, score, flagged))
    if not np.isfinite(score).all():
        raise InputError(f"{path} holds scores that are not finite: audit again")
    return given, Suspects(score, flagged, suggested)
