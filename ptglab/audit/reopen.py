"""What an audit or a run found, opened again: images, labels, suspects by any detector, and learning from other labels.

A folder can be opened if its notebook left `suspects.csv` beside its parameters: 4, 6 (`ptglab audit`) and 9 do.
"""

from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ptglab import data, files
from ptglab.audit import exports, stages, update
from ptglab.audit.corrections import Corrections
from ptglab.detect import label_errors, noise_rate
from ptglab.detect.suspects import Suspects, check
from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.train import backbones, engine, predict

MOST_COMPARED = 20_000  # rows up to which detectors that compare every image with every other one are offered
COLUMNS = ["id", "given", "suggested", "score", "flagged"]
MEANING = {  # of the shares that `Findings.learn` returns
    "test": "right about the test images",
    "right": "out of fold, right about these images",
    "agree": "out of fold, agrees with their labels",
    "joint": "estimated share of wrong labels, confident joint",
    "clusterability": "estimated share of wrong labels, neighbours",
}


class Findings:
    """What the run in `folder` found among `images`, an ImageSet with the labels that were judged.

    source: what the images were loaded from; suspects: those of `detector`, row by row; stored: the arrays that were
    kept, out of probs, float32 [N, K], features, float32 [N, D], and history, float32 [E, N].
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

    @property
    def detectors(self) -> list[str]:
        """The detectors whose scores can be computed from what is stored, the one that decided first."""
        names = label_errors.usable(self._inputs, len(self.images))
        return [self.detector, *(name for name in names if name != self.detector)]

    @property
    def _inputs(self) -> dict:
        """What is stored, without features where comparing all of them would take long."""
        few = len(self.images) <= MOST_COMPARED
        return {name: array for name, array in self.stored.items() if few or name != "features"}

    def suspects(self, detector: str) -> Suspects:
        """Return what one of `detectors` suspects; it is computed once, the one that decided not at all."""
        if detector not in self._found:
            seed, given = self.params.get("seed", 0), self.images.labels_given
            self._found[detector] = label_errors.detect(detector, given, **self._inputs, seed=seed)
        return self._found[detector]

    @property
    def _pixels(self) -> torch.Tensor:
        """The images as the network saw them."""
        return stages.without_empty_colours(self.images.images) if "budget" in self.params else self.images.images

    @cached_property
    def network(self) -> nn.Module | None:
        """The network that a notebook trained and left in this folder; None if there is none."""
        weights = runs.Run(self.folder / "supervised").weights
        return backbones.load(weights)[0] if weights.exists() else None

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
        audited = "budget" in self.params
        if "test" not in data.splits(self.source) or not (audited or self.network):
            return None
        test = data.load(self.source, **_reading(self.params) | {"split": "test", "labels": ""})
        pixels = test.images[:, : self._pixels.shape[1]]
        if audited:
            return stages.features_of(runs.Run(self.folder), test, pixels, engine.place()), test.labels_given
        return predict.features(self.network, pixels), test.labels_given

    def review(self, run: runs.Run) -> int:
        """Begin or continue a review in the folder of `run`; return how many decisions there no longer hold.

        They are on images that are gone or hold something else since then, or had another label, and are set aside.
        Raises InputError if the images are others than in this review, and no audit noted which are.
        """
        now, before, set_aside = update.noted(self.folder / "features"), update.noted(run.path), 0
        if now is not None and before is not None:
            names, (_, new, _, changed) = self.images.class_names, update.compare(before, now)
            labels = {id: names[k] for id, k in zip(self.images.ids, self.images.labels_given, strict=True)}
            for id in (*new, *changed):
                labels.pop(id, None)
            decisions = Corrections(run.path / "corrections.csv")
            set_aside = decisions.set_aside(lambda d: labels.get(d.id) == d.given and d.label in ("", *names))
            (run.path / "fingerprint.txt").unlink(missing_ok=True)
        run.keep_fingerprint(self.images.fingerprint)
        if now is not None:
            exports.write_table(run.path / "images.csv", now)
        return set_aside

    def apply(self, corrections: Corrections, run: runs.Run) -> tuple[np.ndarray, np.ndarray]:
        """Write the mended labels into the folder of `run`, and return (labels int64 [N], which rows are kept).

        mended.csv has id and label, without the images that were dropped; `data.load` takes labels from it if it lies
        beside a folder's images. The stage `mended` holds what notebook 1 leaves: a `data_run` for notebooks 2 to 4,
        unless images were dropped. Nothing else is changed. Raises InputError for corrections of another set.
        """
        images = self.images
        rows = {id: row for row, id in enumerate(images.ids)}
        labels, kept = corrections.applied(rows, images.labels_given, images.class_names)
        ids, names = np.array(images.ids, object)[kept], np.array(images.class_names, object)[labels[kept]]
        files.write_csv(run.path / "mended.csv", pd.DataFrame({"id": ids, "label": names}))
        stage, true = run.stage("mended"), images.labels_true
        arrays = {"labels_given": labels[kept], "ids": ids.astype(str)}
        for name, array in (arrays | ({} if true is None else {"labels_true": true[kept]})).items():
            stage.save_array(name, array)
        params = {name: self.params.get(name) for name in ("labels", "subset", "seed")} | {"dataset": self.source}
        files.write_json(stage.path / "params.json", params)
        return labels, kept

    def learn(self, labels: np.ndarray, kept: np.ndarray | None = None) -> dict[str, float]:
        """Train linear heads on the features with `labels`, int64 [N], of the rows `kept`, by default all.

        Returns shares: `agree`, of the labels that out-of-fold heads predict; `right`, of the true labels that they
        predict, and `test`, of the test images that a head on all rows is right about, where those are known; and the
        noise rate by each of noise_rate.METHODS. Raises InputError if too little is left to learn from.
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
        for method in noise_rate.METHODS if len(self.images) <= MOST_COMPARED else ["joint"]:
            shares[method] = noise_rate.estimate(labels, classes, probs, features, method, bootstrap=2).rate
        return {name: float(share) for name, share in shares.items()}


def compared(before: dict[str, float], after: dict[str, float]) -> pd.DataFrame:
    """Return what `learn` found with the labels before and after mending, in words, in percent."""
    rows = [(MEANING[name], 100 * before[name], 100 * after[name]) for name in MEANING if name in before]
    return pd.DataFrame(rows, columns=["%", "before", "after"]).set_index("%").round(2)


def keep(run: runs.Run, images: data.ImageSet, suspects: Suspects, detector: str, **arrays) -> None:
    """Leave in the folder of `run` what `read` opens beside its parameters.

    images: with the labels that were judged; arrays: probs, features or history, see Findings.
    """
    exports.write_table(run.path / "suspects.csv", exports.table(images, suspects))
    files.write_json(run.path / "summary.json", {"detector": detector})
    for name, array in arrays.items():
        run.save_array(name, array)


def read(folder: str | Path, dataset: str = "") -> Findings:
    """Open the folder that an audit or a run has left.

    dataset: where its images are now, if elsewhere than when it was made. Raises InputError, in one line, if there is
    no such run, if it left no suspects, or if the images or what is stored are not those it was made of.
    """
    run = runs.Run(folder)
    params, path = run.params, run.path / "suspects.csv"
    if not path.is_file():
        raise InputError(f"{folder} holds no suspects.csv: audit images, or execute notebook 4, 6 or 9, and give its "
                         "run_dir")  # fmt: skip
    source = str(dataset or params.get("dataset", ""))
    images = data.load(source, **_reading(params))
    images = images.subset(params.get("subset", 0), params.get("seed", 0))
    known = run.path / "fingerprint.txt"
    if known.exists() and known.read_text(errors="replace").split()[:1] != [images.fingerprint]:
        raise InputError(f"{folder} was made of other images than are in {source} now: audit them again")
    given, suspects = _table(path, images)
    stored = {name: array for name in ("probs", "features", "history") if (array := _stored(run, name)) is not None}
    check(given, **stored)
    detector = params.get("detector", "stored")
    with suppress(OSError, ValueError, TypeError):  # no summary, or a damaged one
        decided = dict(files.read_json(run.path / "summary.json")).get("detector")
        detector = decided if decided in label_errors.DETECTORS else detector
    return Findings(run.path, source, replace(images, labels_given=given), suspects, detector, stored)


def _reading(params: dict) -> dict:
    """Return what `data.load` is to be told about the images of a run beside their source."""
    budget = stages.BUDGETS.get(params.get("budget"))
    reading = {name: params[name] for name in stages.READING if params.get(name)}
    return reading | {"at_most": budget.largest if budget else None}


def _stored(run: runs.Run, name: str) -> np.ndarray | None:
    """Return an array of the run, or of its stage of that name; None if there is none."""
    for stage in (run, runs.Run(run.path / name)):
        if (stage.path / "arrays" / f"{name}.npy").exists():
            return stage.array(name)
    return None


def _table(path: Path, images: data.ImageSet) -> tuple[np.ndarray, Suspects]:
    """Return (given labels int64 [N], suspects) of a suspects.csv, in the order of `images`."""
    number = {name: i for i, name in enumerate(images.class_names)}
    try:
        table = exports.read_table(path)[COLUMNS].set_index("id").astype({"score": np.float32})
        table["flagged"] = [{"True": True, "False": False}[text] for text in table["flagged"]]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is no table of suspects ({' '.join(str(error).split())}): audit again") from None
    if unknown := {*table["given"], *table["suggested"]} - number.keys():
        raise InputError(f"{path} names a class that the images do not have, {min(unknown)!r}: audit again")
    if not table.index.is_unique or set(table.index) != set(images.ids):
        raise InputError(f"{path} lists other images than there are now: audit them again")
    if not np.isfinite(table["score"]).all():
        raise InputError(f"{path} holds scores that are not finite: audit again")
    table = table.loc[images.ids]
    given, suggested = (table[name].map(number).to_numpy(np.int64) for name in ("given", "suggested"))
    return given, Suspects(table["score"].to_numpy(), table["flagged"].to_numpy(bool), suggested)
