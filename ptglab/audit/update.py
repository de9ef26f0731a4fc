"""An audit of images of which some have come, gone or changed: what is known of the others is kept.

Beside finished features lies images.csv: which images they are of. To update is to put that stage aside as `before`;
the new one takes from there what is known, and the stages after it are done again.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor, nn

from ptglab import files
from ptglab.audit import exports
from ptglab.data.images import ImageSet
from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.train import engine, predict

AGAIN = ("probs", "history", "neighbours")  # stages after the features
BLOCK = 4096  # images at a time


class Change(NamedTuple):
    """How a set differs from the one before: the row there of the same pixels, int64 [N], or -1; the ids of others."""

    known: np.ndarray
    new: list[str]
    gone: list[str]
    changed: list[str]

    def __str__(self) -> str:
        counts = f"{len(self.new):,} images are new, {len(self.gone):,} gone, {len(self.changed):,} changed"
        return f"{counts}; the features of {(self.known >= 0).sum():,} of {len(self.known):,} are known"


def hashes(images: ImageSet) -> list[str]:
    """Return a digest of each image, 32 hex digits: of its file, or of its pixels where there are no files."""
    with files.writing("what changes while it is read", every=True):
        return [_of_file(path) for path in images.files] or _of_pixels(images.images)


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _of_pixels(images: Tensor) -> list[str]:
    shape = str(tuple(images.shape[1:])).encode()
    return [hashlib.blake2b(shape + image.numpy().tobytes(), digest_size=16).hexdigest() for image in images]


def listed(images: ImageSet, pixels: Tensor) -> pd.DataFrame:
    """Return a table of the images: id, content, see `hashes`, and a digest of the `pixels` that are learned from."""
    return pd.DataFrame({"id": images.ids, "content": hashes(images), "pixels": _of_pixels(pixels)})


def noted(folder: Path) -> pd.DataFrame | None:
    """Return the table `listed` that lies in `folder`; None if there is none."""
    return exports.read_table(folder / "images.csv") if (folder / "images.csv").exists() else None


def compare(before: pd.DataFrame, now: pd.DataFrame) -> Change:
    """Return how the images `listed` in `now` differ from those before.

    An image is known by its pixels, wherever it was moved, since they depend on more than the file: on the size that
    all images are brought to, for one. It has changed if its file has.
    """
    rows = {digest: row for row, digest in enumerate(before["pixels"])}
    known = np.array([rows.get(digest, -1) for digest in now["pixels"]], np.int64)
    old, here = (dict(zip(table["id"], table["content"], strict=True)) for table in (before, now))
    changed = [id for id in here if old.get(id, here[id]) != here[id]]
    return Change(known, [id for id in here if id not in old], [id for id in old if id not in here], changed)


def begin(run: runs.Run, images: ImageSet, pixels: Tensor) -> Change:
    """Make the audit in the folder of `run` one of `images`, and return how they differ; in place of keep_fingerprint.

    If nothing is known of any, all is done again; otherwise the network stays that of the images before. Whatever
    interrupts it, it goes on. Raises InputError if nobody noted which images were audited.
    """
    finished, before, fingerprint = (run.path / name for name in ("features", "before", "fingerprint.txt"))
    now, done = listed(images, pixels), (finished / "done").exists()
    old = noted(finished if done else before)
    change = compare(now.head(0) if old is None else old, now)
    same = fingerprint.exists() and fingerprint.read_text() == images.fingerprint
    if same and (old is None or now.equals(old)):
        return change
    if done and old is None:
        raise InputError(f"{run.path} does not say which images it is of: give another run_dir, or delete that folder")
    with files.writing(run.path, every=True):
        if done:
            shutil.rmtree(before, ignore_errors=True)
            os.replace(finished, before)
        for name in ("features", *AGAIN, *(() if (change.known >= 0).any() else ("pretrain", "before"))):
            shutil.rmtree(run.path / name, ignore_errors=True)
        fingerprint.unlink(missing_ok=True)
    run.keep_fingerprint(images.fingerprint)
    return change


def weights(run: runs.Run) -> Path | None:
    """Return the weights of the network that made the features before, if any of them are kept."""
    path = runs.Run(run.path / "before").weights
    return path if path.exists() else None


def features(run: runs.Run, network: nn.Module, images: ImageSet, pixels: Tensor, place: engine.Place) -> None:
    """Finish the stage `features` of `run`: those of `network`, or from before where they are known."""
    stage, before, now = run.stage("features"), runs.Run(run.path / "before"), listed(images, pixels)
    array, old = stage.growing_array("features", (len(images), network.num_features)), noted(before.path)
    known = compare(now.head(0) if old is None else old, now).known
    stored = array if old is None else before.array("features")
    for rows in np.array_split(np.arange(len(images)), range(BLOCK, len(images), BLOCK)):
        kept, rest = rows[known[rows] >= 0], rows[known[rows] < 0]
        array[kept] = stored[known[kept]]
        if len(rest):
            array[rest] = predict.features(network, pixels[rest], place)
    exports.write_table(stage.path / "images.csv", now)
    stage.finish()
    shutil.rmtree(before.path, ignore_errors=True)
