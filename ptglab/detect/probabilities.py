"""What confident learning reads from rows of probabilities: thresholds, the confident class, the confident joint.

Compiled passes, each over all rows once, block by block, side by side in threads: what a row leaves is a few numbers,
so that probabilities larger than memory may lie in a mapped file. Northcutt et al. 2021 (arXiv 1911.00068).
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from ptglab.errors import InputError

TIE = 1e-6  # probabilities closer than this count as equal
BLOCK_ROWS = 1 << 20  # of probabilities that are read at a time: they may lie in a mapped file
PARTS = 4  # of the rows that each thread takes, so that none waits long for another


@dataclass(frozen=True)
class Read:
    """Of each row: own [N], its label's probability; largest [N], its largest one; best [N], the first such class."""

    own: np.ndarray
    largest: np.ndarray
    best: np.ndarray

    @property
    def doubtful(self) -> np.ndarray:
        """bool [N]: the label is not the most probable class."""
        return self.own < self.largest - TIE


def read(labels: np.ndarray, probs: np.ndarray) -> Read:
    """Find what the detectors ask of each row, and raise InputError if a value is not finite."""
    largest, own = np.empty(len(probs), probs.dtype), np.empty(len(probs), probs.dtype)
    best = np.empty(len(probs), np.int64)
    for start in range(0, len(probs), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that it could write to a read-only array; nobody does
            tensor = torch.from_numpy(np.ascontiguousarray(probs[rows]))
        if not tensor.sum().isfinite():
            raise InputError("probs holds values that are not finite")
        largest[rows] = tensor.amax(1).numpy()
        _in_threads(_read_rows, labels[rows], tensor.numpy(), largest[rows], own[rows], best[rows])
    return Read(own, largest, best)


def margin(labels: np.ndarray, probs: np.ndarray, rows: Read) -> np.ndarray:
    """Return [N]: the label's probability less the largest other; `rows` is what `read` found."""
    other = rows.largest.copy()
    _in_threads(_search_others, labels, probs, rows.best, other)
    return rows.own - other


def class_means(labels: np.ndarray, own: np.ndarray, num_classes: int) -> np.ndarray:
    """Return [K]: the mean of `own` [N] over the rows of each label, infinite where there is none (equation 2)."""
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    classes = np.split(_grouped(labels, own, np.append(0, ends)), ends[:-1])
    return np.array([max(values.mean(), 2 * TIE) if len(values) else np.inf for values in classes], own.dtype)


def class_thresholds(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return t [K]: the mean probability of class j among rows labelled j; infinite for a class nobody has."""
    return class_means(labels, probs[np.arange(len(labels)), labels], probs.shape[1])


def confident_class(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return int64 [N]: the class each row confidently belongs to, -1 for none.

    The class whose threshold its probability reaches; the most probable class, if several reach theirs.
    """
    rows = read(labels, probs)
    return search(probs, class_means(labels, rows.own, probs.shape[1]), rows, np.ones(len(labels), bool))


def search(probs: np.ndarray, thresholds: np.ndarray, rows: Read, asked: np.ndarray) -> np.ndarray:
    """Return int64 [N]: see `confident_class`; the most probable class where not `asked`, bool [N]."""
    guess = rows.best.copy()
    least = thresholds - probs.dtype.type(TIE)
    _in_threads(lambda *part: _search_rows(least, *part), probs, rows.largest, guess, asked)
    return guess


def calibrated(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the confident joint float64 [given, true] of `counts` of confident rows, as cleanlab calibrates it.

    Each class keeps one right row at least, and its rows sum up to `sizes` [K], the number of its labels (equation 3).
    """
    counts = counts.astype(np.float64, order="F")  # summed in cleanlab's order: its last bit rounds halves
    np.fill_diagonal(counts, counts.diagonal().clip(min=1))
    joint = (counts.T / counts.sum(1) * sizes).T
    return joint / joint.sum() * sizes.sum()


def joint(
    labels: np.ndarray, probs: np.ndarray, rows: Read | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the calibrated confident joint float64 [K, K]: how many labels are given as i where j is true.

    weights: [N], how often each row counts, once by default. Northcutt et al. 2021 (arXiv 1911.00068), equations 1
    to 3.
    """
    k, rows = probs.shape[1], rows or read(labels, probs)
    sizes = np.bincount(labels, weights, k)
    if weights is None:
        thresholds = class_means(labels, rows.own, k)
    else:
        means = np.bincount(labels, weights * rows.own, k) / sizes.clip(min=TIE)
        thresholds = np.where(sizes > 0, means.clip(min=2 * TIE), np.inf).astype(probs.dtype)
    guess = search(probs, thresholds, rows, np.ones(len(labels), bool))
    sure = guess >= 0
    weights = None if weights is None else weights[sure]
    counts = np.bincount(labels[sure] * k + guess[sure], weights, k * k).reshape(k, k)
    return calibrated(counts, sizes)


def removals(labels: np.ndarray, probs: np.ndarray, rows: Read) -> np.ndarray:
    """Return int64 [given, true]: how many labels to remove from each class for another, and on the diagonal to keep.

    The calibrated joint in whole numbers, row by row to the same sum; each class keeps one label at least, at the
    cost of one of each of its other counts. Roundings are cleanlab's (2.7), which the paper leaves open.
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


@njit(nogil=True)
def _read_rows(labels, probs, largest, own, best):
    """Fill in own and best."""
    for i in range(len(labels)):
        row, first = probs[i], len(probs[i])
        for j in range(len(row)):
            first = min(first, j if row[j] == largest[i] else len(row))
        own[i], best[i] = row[labels[i]], first


@njit(nogil=True)
def _search_others(labels, probs, best, other):
    """Fill in other where the label is the most probable class."""
    for i in range(len(labels)):
        if best[i] == labels[i]:
            other[i] = -np.inf
            for j in range(probs.shape[1]):
                if j != labels[i]:
                    other[i] = max(other[i], probs[i, j])


@njit(nogil=True)
def _grouped(labels, values, starts):
    """Return `values` class by class, in order within each; class j goes to starts[j] and on."""
    grouped, place = np.empty_like(values), starts.copy()
    for i in range(len(labels)):
        grouped[place[labels[i]]] = values[i]
        place[labels[i]] += 1
    return grouped


@njit(nogil=True)
def _search_rows(least, probs, largest, guess, asked):
    """Put the only class that reaches its `least` in the place of a most probable one that does not, or else -1.

    Where the most probable class reaches its own it is the answer, alone or as the most probable of several.
    """
    lowest = least.min()
    for i in range(len(guess)):
        if asked[i] and largest[i] < lowest:
            guess[i] = -1
        elif asked[i] and largest[i] < least[guess[i]]:
            row, reached = probs[i], 0
            for j in range(len(row)):
                reached += row[j] >= least[j]
            if reached == 0:
                guess[i] = -1
            elif reached == 1:
                guess[i] = 0
                while row[guess[i]] < least[guess[i]]:
                    guess[i] += 1


def _in_threads(function: Callable, *arrays: np.ndarray) -> list:
    """Return `function` of each part of `arrays`, a few rows of all at a time; compiled code runs side by side."""
    parts = zip(*(np.array_split(array, PARTS * torch.get_num_threads()) for array in arrays), strict=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda rows: function(*rows), parts))
