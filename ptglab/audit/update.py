"""An audit of images of which some have come, gone or changed: what is known of the others is kept.

Beside finished features lies images.csv: which images they are of. To update is to put that stage aside as `before`;
`stages.features` takes from there what is known, and the stages after it are done again.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from ptglab import files
from ptglab.audit import exports
from ptglab.data.images import ImageSet
from ptglab.errors import InputError
from ptglab.lab import runs

AGAIN = ("probs", "history", "neighbours")  # stages after the features


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

    An image is known by its file and its pixels, wherever it was moved: pixels depend on more than the file, such as
    the size that all images are brought to. It has changed if its file has.
    """
    rows = {content: row for row, content in enumerate(zip(before["content"], before["pixels"], strict=True))}
    known = [rows.get(content, -1) for content in zip(now["content"], now["pixels"], strict=True)]
    old, here = (dict(zip(table["id"], table["content"], strict=True)) for table in (before, now))
    changed = [id for id in here if old.get(id, here[id]) != here[id]]
    gone, new = ([id for id in one if id not in other] for one, other in ((old, here), (here, old)))
    return Change(np.array(known, np.int64), new, gone, changed)


def known(before: runs.Run, now: pd.DataFrame) -> np.ndarray:
    """Return int64 [N]: the row of each image `listed` in `now` in the stage `before`, -1 where it has none."""
    old = noted(before.path)
    return np.full(len(now), -1) if old is None else compare(old, now).known


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
