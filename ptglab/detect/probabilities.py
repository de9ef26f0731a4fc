"""Confident learning on rows of probabilities: thresholds, confident classes, the confident joint.

Rows are read once, in blocks and in threads, and leave a few numbers each, so that probabilities larger than memory may
be mapped from a file. Northcutt et al. 2021 (arXiv 1911.00068).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ptglab.detect.suspects import class_rows
from ptglab.errors import InputError

TIE = 1e-6  # probabilities closer than this count as equal
BLOCK_ELEMENTS = 1 << 18  # probabilities read at a time by each thread: they fit into its cache


@dataclass(frozen=True)
class Read:
    """For each row [N]: `own`, its label's probability; `largest`, the largest one; `best`, the first such class."""

    own: np.ndarray
    largest: np.ndarray
    best: np.ndarray

    @property
    def doubtful(self) -> np.ndarray:
        """bool [N]: the label is not the most probable class."""
        return self.own < self.largest - TIE


def read(labels: np.ndarray, probs: np.ndarray) -> Read:
    """Return what the detectors need to know of each row. Raises InputError if a value is not finite."""
    n, block_rows = len(probs), max(1, BLOCK_ELEMENTS // probs.shape[1])
    own, largest, best = np.empty(n, probs.dtype), np.empty(n, probs.dtype), np.empty(n, np.int64)

    def read_block(start: int) -> None:
        rows = slice(start, start + block_rows)
        block, each = probs[rows], np.arange(len(own[rows]))
        own[rows], best[rows] = block[each, labels[rows]], block.argmax(1)
        largest[rows] = block[each, best[rows]]  # NaN where there is one
        if not (np.isfinite(largest[rows]).all() and np.isfinite(block.min())):
            raise InputError("probs holds values that are not finite")

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # NumPy works on blocks in parallel
        list(pool.map(read_block, range(0, n, block_rows)))
    return Read(own, largest, best)


def margin(labels: np.ndarray, probs: np.ndarray, rows: Read) -> np.ndarray:
    """Return [N]: the label's probability less the largest other one; `rows` is what `read` found."""
    other, sure = rows.largest.copy(), np.flatnonzero(rows.best == labels)
    for part in np.array_split(sure, 1 + len(sure) * probs.shape[1] // BLOCK_ELEMENTS):
        block = probs[part]
        block[np.arange(len(part)), labels[part]] = -np.inf
        other[part] = block.max(1)
    return rows.own - other


def class_thresholds(labels: np.ndarray, own: np.ndarray, num_classes: int) -> np.ndarray:
    """Return t [K]: the mean probability `own` [N] of each label among its rows; infinite for no rows (equation 2)."""
    classes = [own[rows] for rows in class_rows(labels, num_classes)]
    return np.array([max(values.mean(), 2 * TIE) if len(values) else np.inf for values in classes], own.dtype)


def confident_classes(probs: np.ndarray, thresholds: np.ndarray, rows: Read) -> np.ndarray:
    """Return int64 [N]: the class whose threshold the row's probability reaches, -1 for none.

    Where several classes reach theirs, it is the most probable class. `rows` is what `read` found.
    """
    least = thresholds - probs.dtype.type(TIE)
    guess = np.where(rows.largest >= least[rows.best], rows.best, -1)
    unsure = np.flatnonzero((guess < 0) & (rows.largest >= least.min()))
    for part in np.array_split(unsure, 1 + len(unsure) * probs.shape[1] // BLOCK_ELEMENTS):
        reached = probs[part] >= least
        several = reached.sum(1) > 1
        guess[part] = np.where(several, rows.best[part], np.where(reached.any(1), reached.argmax(1), -1))
    return guess


def calibrated(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the confident joint float64 [given, true] of `counts` of confident rows, as cleanlab calibrates it.

    Each class keeps at least one right row, and its counts are scaled to sum to `sizes` [K], the number of its labels
    (equation 3).
    """
    counts = counts.astype(np.float64, order="F")  # summed in cleanlab's order: its last bit rounds halves
    np.fill_diagonal(counts, counts.diagonal().clip(min=1))
    joint = (counts.T / counts.sum(1) * sizes).T
    return joint / joint.sum() * sizes.sum()


def joint(
    labels: np.ndarray, probs: np.ndarray, rows: Read | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the calibrated confident joint float64 [K, K]: how many labels are given as i where j is true.

    weights: [N], how often each row counts, once by default. Equations 1 to 3 of Northcutt et al. 2021.
    """
    k, rows = probs.shape[1], rows or read(labels, probs)
    sizes = np.bincount(labels, weights, k)
    if weights is None:
        thresholds = class_thresholds(labels, rows.own, k)
    else:
        means = np.bincount(labels, weights * rows.own, k) / sizes.clip(min=TIE)
        thresholds = np.where(sizes > 0, means.clip(min=2 * TIE), np.inf).astype(probs.dtype)
    guess = confident_classes(probs, thresholds, rows)
    sure = guess >= 0
    weights = None if weights is None else weights[sure]
    counts = np.bincount(labels[sure] * k + guess[sure], weights, k * k).reshape(k, k)
    return calibrated(counts, sizes)


def removals(labels: np.ndarray, probs: np.ndarray, rows: Read) -> np.ndarray:
    """Return int64 [given, true]: how many labels of each class belong to another; on the diagonal, how many to keep.

    This is the calibrated joint, rounded so that each row keeps its sum. Each class keeps at least one label, at the
    cost of one of each of its other counts. The paper leaves the rounding open; this is cleanlab's (2.7).
    """
    counts = joint(labels, probs, rows)
    whole = counts.round()
    for exact, row in zip(counts, whole, strict=True):
        short = int(exact.sum().round() - row.sum())
        order = np.argsort(exact - row)  # the most rounded up first
        row[order[::-1][:short] if short > 0 else order[:-short]] += np.sign(short)
    kept = whole.diagonal().clip(min=1)
    whole = (whole - (kept - whole.diagonal())[:, None]).clip(min=0)
    np.fill_diagonal(whole, kept)
    return whole.astype(np.int64)
