"""Confident learning (Northcutt et al. 2021, arXiv 1911.00068): its detectors, its thresholds and its joint.

Rows of probabilities are read once, in blocks and in threads, and leave a few numbers each, so that they may be mapped
from a file larger than memory.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from ptglab.detect.suspects import Suspects, class_rows, suspects
from ptglab.errors import InputError

TIE = 1e-6  # probabilities closer than this count as equal
BLOCK_ELEMENTS = 1 << 17  # probabilities read at a time by each thread: they fit into its cache


def confidence(labels: np.ndarray, probs: np.ndarray, share: float = 0.5) -> Suspects:
    """Flag labels whose probability is below `share` of the mean in their class; the score is that probability.

    The "self-confidence" of section 3. The threshold follows the class, because a head fitted on noisy labels is less
    sure of a label the more of them are wrong.
    """
    rows = read(labels, probs)
    thresholds = class_thresholds(labels, rows.own, probs.shape[1])
    return suspects(labels, probs, rows.own, rows.own < share * thresholds[labels], rows.best)


def disagreement(labels: np.ndarray, probs: np.ndarray, lead: float = TIE) -> Suspects:
    """Flag labels that another class leads by more than `lead`; the score is their probability less the largest other.

    This is the baseline "predicted is not given" (C_confusion) of section 4.
    """
    rows = read(labels, probs)
    score = margin(labels, probs, rows)
    return suspects(labels, probs, score, score < -lead, rows.best)


def confident_learning(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag the off-diagonal of the confident joint; the score is the probability of the given label.

    A label is flagged if the row is confidently of another class (`confident_classes`, with the mean probability of
    each class among its labels as threshold), and it is not the most probable class. Equations 1 and 2.
    """
    rows = read(labels, probs)
    guess = confident_classes(probs, class_thresholds(labels, rows.own, probs.shape[1]), rows)
    flagged = (guess >= 0) & (guess != labels) & (rows.own < rows.largest - TIE)
    return suspects(labels, probs, rows.own, flagged, rows.best)


def prune(labels: np.ndarray, probs: np.ndarray, by: str = "both") -> Suspects:
    """Flag as many labels as the confident joint counts as wrong: methods 3 to 5 of section 3.2.

    by: "class", in each class those of the lowest probability; "noise_rate", for each pair of classes those that the
    other class leads by most; "both", what both rules flag. As in cleanlab, no label that is the most probable class is
    flagged. The score is the label's probability; by noise rate, less the largest other one.
    """
    rows, (n, k) = read(labels, probs), probs.shape
    counts = removals(labels, probs, rows)
    by_class, by_pair = np.full(n, by == "noise_rate"), np.full(n, by == "class")  # a rule not asked for flags all
    for j, members in enumerate(class_rows(labels, k)):
        own = rows.own[members]
        by_class[members[np.argsort(own)[: len(members) - counts[j, j]]]] = True
        others = np.flatnonzero(counts[j] * (np.arange(k) != j))
        for i in others if by != "class" else []:
            by_pair[members[np.argsort(own - probs[members, i])[: counts[j, i]]]] = True
    score = margin(labels, probs, rows) if by == "noise_rate" else rows.own
    return suspects(labels, probs, score, by_class & by_pair & (rows.own < rows.largest - TIE), rows.best)


class Read(NamedTuple):
    """For each row [N]: `own`, its label's probability; `largest`, the largest one; `best`, the first such class."""

    own: np.ndarray
    largest: np.ndarray
    best: np.ndarray


def read(labels: np.ndarray, probs: np.ndarray) -> Read:
    """Return what the detectors need to know of each row. Raises InputError if a value is not finite."""
    n, block_rows = len(probs), max(1, BLOCK_ELEMENTS // probs.shape[1])
    own, largest, best = np.empty(n, probs.dtype), np.empty(n, probs.dtype), np.empty(n, np.int64)

    def read_block(start: int) -> None:
        rows = slice(start, start + block_rows)
        block = probs[rows]
        best[rows], flat, first = block.argmax(1), block.reshape(-1), np.arange(0, block.size, block.shape[1])
        own[rows] = flat.take(first + labels[rows])  # several times faster than block[row, label]
        largest[rows] = flat.take(first + best[rows])  # NaN where there is one
        if not (np.isfinite(largest[rows]).all() and np.isfinite(block.min())):
            raise InputError("probs holds values that are not finite")

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # NumPy works on blocks in parallel
        list(pool.map(read_block, range(0, n, block_rows)))
    return Read(own, largest, best)


def margin(labels: np.ndarray, probs: np.ndarray, rows: Read | None = None) -> np.ndarray:
    """Return [N]: the label's probability less the largest other one; `rows` is what `read` found, if it was called."""
    rows = rows or read(labels, probs)
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


def joint(labels: np.ndarray, probs: np.ndarray, rows: Read | None = None, weights=None) -> np.ndarray:
    """Return the calibrated confident joint float64 [K, K]: how many labels are given as i where j is true.

    weights: [N], how often each row counts, once by default. Counts of confident rows are scaled to sum to the number
    of each class's labels, of which at least one is right, as in cleanlab. Equations 1 to 3.
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
    counts = np.bincount(labels[sure] * k + guess[sure], None if weights is None else weights[sure], k * k)
    counts = np.asfortranarray(counts.reshape(k, k), np.float64)  # in cleanlab's order of summing: halves round alike
    np.fill_diagonal(counts, counts.diagonal().clip(min=1))
    scaled = (counts.T / counts.sum(1) * sizes).T
    return scaled / scaled.sum() * sizes.sum()


def removals(labels: np.ndarray, probs: np.ndarray, rows: Read) -> np.ndarray:
    """Return int64 [given, true]: how many labels of each class belong to another; on the diagonal, how many to keep.

    The joint is rounded so that each row keeps its sum, and each class keeps at least one label, at the cost of one of
    each of its other counts. The paper leaves the rounding open; this is cleanlab's (2.7).
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
