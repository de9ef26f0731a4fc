"""What every detector takes and returns: checks of the inputs, and `Suspects`, which can be flagged anew."""

from dataclasses import dataclass, replace

import numpy as np

from ptglab.errors import InputError

BLOCK_ROWS = 1 << 16  # rows checked at a time: they may be mapped from a file


@dataclass(frozen=True)
class Suspects:
    """score: float32 [N], low = suspicious; flagged: bool [N]; suggested: int64 [N], the label to put instead."""

    score: np.ndarray
    flagged: np.ndarray
    suggested: np.ndarray


def suspects(labels, belief: np.ndarray, score: np.ndarray, flagged: np.ndarray, best=None) -> Suspects:
    """Return Suspects that suggest the likeliest class, or, for a flagged label, the likeliest other class.

    labels: the given ones, int64 [N]; belief: float [N, K], high = likely; score [N]; flagged: bool [N];
    best: int64 [N], the largest column of each row of `belief`, where that is already known.
    """
    suggested = belief.argmax(1) if best is None else best.copy()
    same = np.flatnonzero(flagged & (suggested == labels))
    others = belief[same]
    others[np.arange(len(same)), labels[same]] = -np.inf
    suggested[same] = others.argmax(1)
    return Suspects(score.astype(np.float32, copy=False), flagged, suggested)


def flag(found: Suspects, count: int, labels=None, belief: np.ndarray | None = None) -> Suspects:
    """Return `found` with the `count` rows of the lowest score flagged instead; of equal scores, the first rows.

    With `labels`, the given ones, and `belief`, float [N, K], suggestions are made anew, so that no flagged label is
    suggested again; otherwise they stay as they are. Raises InputError for a count outside 0 to N.
    """
    n = len(found.score)
    if not (0 <= count <= n and count == int(count)):
        raise InputError(f"{count} labels cannot be flagged: choose a whole number from 0 to {n}")
    flagged = np.zeros(n, bool)
    flagged[np.argsort(found.score, kind="stable")[: int(count)]] = True
    if labels is None or belief is None:
        return replace(found, flagged=flagged)
    return suspects(np.asarray(labels), belief, found.score, flagged)


def check(labels: np.ndarray, **arrays: np.ndarray) -> None:
    """Raise InputError unless `arrays`, named probs, features, history or neighbours, fit the given labels, int [N].

    Whether probabilities are finite is checked where they are read.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"labels are {labels.dtype} of shape {labels.shape}; they must be whole numbers, one a row")
    for name, array in arrays.items():
        array = np.asarray(array[1]) if name == "neighbours" else array
        if array.ndim != 2 or (0 in array.shape and len(labels)):
            raise InputError(f"{name} is empty or not of two dimensions: its shape is {array.shape}")
        if (rows := array.shape[name == "history"]) != len(labels):
            raise InputError(f"{name} has {rows} rows for {len(labels)} labels")
        blocks = range(0, len(array), BLOCK_ROWS)
        if name != "probs" and not all(np.isfinite(array[i : i + BLOCK_ROWS]).all() for i in blocks):
            raise InputError(f"{name} holds values that are not finite")


def check_classes(labels: np.ndarray, num_classes: int | None = None) -> None:
    """Raise InputError unless labels, int [N > 0], lie between 0 and `num_classes` - 1, with at least 2 classes."""
    low, high = labels.min(), labels.max()
    if low < 0 or (num_classes is not None and not high < num_classes >= 2):
        classes = "" if num_classes is None else f" for {num_classes} classes"
        raise InputError(f"labels run from {low} to {high}{classes}; they start at 0, and there are at least 2 classes")


def class_rows(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the rows of each of `num_classes` labels, int64 [N_j] in order."""
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    small = labels.astype(np.min_scalar_type(num_classes))  # NumPy sorts 16 bits several times faster than 64
    return np.split(np.argsort(small, kind="stable"), ends[:-1])
