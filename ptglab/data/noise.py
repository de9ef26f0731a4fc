"""Label noise: clean labels, a rate and a seed in, given labels out; NumPy only."""

from collections.abc import Mapping

import numpy as np

from ptglab.errors import InputError, one_of

# Which class each one is mistaken for under asymmetric noise; a class that is not named keeps its labels.
# CIFAR-10 and MNIST digits: Patrini et al. 2017 (arXiv 1609.03683), section 6.
ASYMMETRIC: dict[str, dict[int, int]] = {
    "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},  # truck > automobile, bird > airplane, deer > horse, cat <> dog
    "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
}
# The superclass of each of the 100 classes, in the data set's own (alphabetical) order.
CIFAR100_SUPERCLASS = np.array([
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
])  # fmt: skip
KINDS = ("none", "uniform", "asymmetric", "pair_flip", "transition", "instance", "human")


def apply(
    kind: str, labels: np.ndarray, rate: float, num_classes: int, seed: int, *, include_self: bool = False,
    mapping: str | Mapping[int, int] = "", matrix: np.ndarray | None = None, images: np.ndarray | None = None,
    human: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Return given labels, int64 [N], made from clean `labels` [N] by noise of one of KINDS at nominal `rate`.

    `include_self`, `mapping`, `matrix`: see `transition_matrix`. `images` [N, ...] is what instance noise looks at.
    `human` [N] is the label column that human noise is; the rate is then what people made it. Report
    `effective_rate` beside the nominal one. Raises InputError for an unknown kind, a rate outside 0 to 1, labels
    outside 0 to num_classes - 1, and a missing option.
    """
    one_of("noise", kind, KINDS)
    labels = check_labels(labels, num_classes)
    if not 0 <= rate <= 1:
        raise InputError(f"noise_rate is {rate}; it must lie between 0 and 1")
    if kind == "human":
        if human is None or len(human) != len(labels):
            raise InputError("human noise is a label column: name it with the parameter `labels`")
        return check_labels(human, num_classes).copy()
    if kind == "none":
        return labels.copy()
    rng = np.random.default_rng(seed)
    if kind == "instance":
        if images is None or len(images) != len(labels):
            raise InputError("instance-dependent noise needs the images, one a label")
        rows = _instance_rows(labels, rate, num_classes, images, rng)
    else:
        t = transition_matrix(kind, rate, num_classes, include_self=include_self, mapping=mapping, matrix=matrix)
        rows = t[labels]
    # Inverse transform: the class whose cumulative probability first exceeds one uniform draw a row.
    cumulative = rows.cumsum(1)
    return (rng.random((len(labels), 1)) * cumulative[:, -1:] >= cumulative).sum(1).astype(np.int64)


def transition_matrix(
    kind: str, rate: float, num_classes: int, *, include_self: bool = False,
    mapping: str | Mapping[int, int] = "", matrix: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Return T float64 [K, K]: T[i, j] is the probability that a label i is given as j.

    uniform: rate / (K - 1) for every other class; with `include_self` the draw is over all K classes (the convention
    of DivideMix, arXiv 2002.07394), so that rate (K - 1) / K of the labels differ. asymmetric: a class goes to the one
    `mapping` names, a key of ASYMMETRIC, "cifar100" (the next class in its superclass) or a dict; any other name means
    the next class. pair_flip: every class goes to the next one (Co-teaching, arXiv 1804.06872). transition: `matrix`.
    """
    if kind == "transition":
        t = np.asarray(matrix, float)
        if t.shape != (num_classes, num_classes) or (t < 0).any() or not np.allclose(t.sum(1), 1):
            size = f"{num_classes} x {num_classes}"
            raise InputError(f"transition noise needs a matrix of {size}, its rows probabilities that sum to 1")
        return t
    _check_classes(num_classes)
    if kind == "uniform":
        each = rate / num_classes if include_self else rate / (num_classes - 1)
        t = np.where(np.eye(num_classes), 0, each)
        np.fill_diagonal(t, 1 - t.sum(1))
        return t
    t = np.eye(num_classes)
    for source, target in _targets("" if kind == "pair_flip" else mapping, num_classes).items():
        if not (0 <= source < num_classes and 0 <= target < num_classes):
            raise InputError(f"the mapping {source} > {target} leaves the classes 0 to {num_classes - 1}")
        t[source, source] -= rate
        t[source, target] += rate
    return t


def _targets(mapping: str | Mapping[int, int], num_classes: int) -> Mapping[int, int]:
    """Return which class each one is mistaken for; see `transition_matrix`."""
    if not isinstance(mapping, str):
        return mapping
    if mapping == "cifar100":
        groups = [np.flatnonzero(s == CIFAR100_SUPERCLASS) for s in range(20)]
        return {int(a): int(b) for group in groups for a, b in zip(group, np.roll(group, -1), strict=True)}
    return ASYMMETRIC.get(mapping) or {i: (i + 1) % num_classes for i in range(num_classes)}


def effective_rate(labels_true: np.ndarray, labels_given: np.ndarray) -> float:
    """Return the share of labels that really differ."""
    return float((np.asarray(labels_true) != np.asarray(labels_given)).mean())


def empirical_transition(labels_true: np.ndarray, labels_given: np.ndarray, num_classes: int) -> np.ndarray:
    """Return float64 [K, K]: the share of class i that is given as j; NaN rows for a class nobody has."""
    counts = np.zeros((num_classes,) * 2)
    np.add.at(counts, (labels_true, labels_given), 1)
    totals = counts.sum(1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def check_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return `labels` as int64 [N]. Raises InputError naming the first one outside 0 to num_classes - 1."""
    labels = np.asarray(labels, np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise InputError(f"row {bad[0]} has the label {labels[bad[0]]}; labels run from 0 to {num_classes - 1}")
    return labels


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise InputError("there is only one class: labels cannot be wrong")


def _instance_rows(
    labels: np.ndarray, rate: float, num_classes: int, images: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return [N, K] probabilities of the given label, as in Xia et al. 2020 (arXiv 2006.07836), algorithm 2.

    Each image flips with its own rate, a normal of deviation 0.1 about `rate` drawn again until it lies in 0..1; where
    to, is the softmax of its pixels times a random projection of its class.
    """
    _check_classes(num_classes)
    pixels = np.asarray(images).reshape(len(labels), -1).astype(np.float32)
    pixels = (pixels - pixels.mean()) / (pixels.std() + 1e-6)
    rates = rng.normal(rate, 0.1, len(labels))
    while (outside := (rates < 0) | (rates > 1)).any():
        rates[outside] = rng.normal(rate, 0.1, int(outside.sum()))
    rows = np.zeros((len(labels), num_classes))
    for c in range(num_classes):
        projection = rng.standard_normal((pixels.shape[1], num_classes), np.float32)
        own = labels == c
        logits = pixels[own] @ projection
        logits[:, c] = -np.inf
        softmax = np.exp(logits - logits.max(1, keepdims=True, initial=-1e30))
        rows[own] = rates[own, None] * softmax / softmax.sum(1, keepdims=True)
        rows[own, c] = 1 - rates[own]
    return rows
