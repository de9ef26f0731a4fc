"""What every detector takes and returns: checks of the inputs, and `Suspects`, which can be flagged anew."""

from dataclasses import dataclass

import numpy as np

from ptglab.errors import InputError

BLOCK_ROWS = 1 << 16  # rows checked at a time: they may be mapped from a file


@dataclass(frozen=True)
class Suspects:
    """score: float32 [N], low = suspicious; flagged: bool [N]; suggested: int64 [N], the label to put instead."""

    score: np.ndarray
    flagged: np.ndarray
    suggested: np.ndarray


def suspects(
    labels: np.ndarray, belief: np.ndarray, score: np.ndarray, flagged: np.ndarray, best: np.ndarray | None = None
) -> Suspects:
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


def flag(found: Suspects, count: int, labels: np.ndarray | None = None, belief: np.ndarray | None = None) -> Suspects:
    """Return `found` with the `count` rows of the lowest score flagged instead; of equal scores, the first rows.

    With `labels`, the given ones, and `belief`, float [N, K] (the probabilities, or whatever the detector went by),
    suggestions are made anew, so that no flagged label is suggested again; otherwise they stay as they are. For a
    noise rate r, `count` is round(r N). Raises InputError for a count outside 0 to N.
    """
    n = len(found.score)
    if not (0 <= count <= n and count == int(count)):
        raise InputError(f"{count} labels cannot be flagged: choose a whole number from 0 to {n}")
    flagged = np.zeros(n, bool)
    flagged[np.argsort(found.score, kind="stable")[: int(count)]] = True
    if labels is None or belief is None:
        return Suspects(found.score, flagged, found.suggested)
    return suspects(np.asarray(labels), belief, found.score, flagged)


def check(labels: np.ndarray, **arrays: np.ndarray) -> None:
    """Raise InputError unless `arrays`, named probs, features, history or neighbours, fit the given labels, int [N].

    Probabilities that are not finite are refused where they are read, which saves a pass over them.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"labels are {labels.dtype} of shape {labels.shape}; they must be whole numbers, one a row")
    if "neighbours" in arrays and len(index := arrays.pop("neighbours")[1]) != len(labels):
        raise InputError(f"neighbours has {len(index)} rows for {len(labels)} labels")
    for name, array in arrays.items():
        if array.ndim != 2:
            raise InputError(f"{name} has {array.ndim} dimensions; it must have 2")
        rows = array.shape[1] if name == "history" else len(array)
        if rows != len(labels):
            raise InputError(f"{name} has {rows} rows for {len(labels)} labels")
        if 0 in array.shape and rows:
            raise InputError(f"{name} is empty")
        blocks = range(0, len(array), BLOCK_ROWS)
        if name != "probs" and not all(np.isfinite(array[i : i + BLOCK_ROWS]).all() for i in blocks):
            raise InputError(f"{name} holds values that are not finite")


def check_classes(labels: np.ndarray, num_classes: int | None = None) -> None:
    """Raise InputError unless labels, int [N > 0], lie between 0 and `num_classes` - 1, with at least 2 classes."""
    if labels.min() < 0:
        raise InputError(f"labels run from {labels.min()} to {labels.max()}; they start at 0")
    if num_classes is not None and not labels.max() < num_classes >= 2:
        found = f"labels run from {labels.min()} to {labels.max()}"
        raise InputError(f"{found} for {num_classes} classes; they start at 0, and there must be 2 classes at least")


def class_rows(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the rows of each of `num_classes` labels, int64 [N_j] in order."""
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    small = labels.astype(np.min_scalar_type(num_classes))  # NumPy sorts 16 bits several times faster than 64
    return np.split(np.argsort(small, kind="stable"), ends[:-1])
