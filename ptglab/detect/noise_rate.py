"""How many of the given labels are wrong, and which class is given for which, estimated without the truth."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ptglab.detect import probabilities
from ptglab.detect.neighbours import Neighbours, first_k
from ptglab.detect.suspects import check, check_classes
from ptglab.errors import InputError, one_of

METHODS = ("joint", "clusterability")
MAX_STEPS, TOLERANCE = 500, 1e-5  # of the fit to the consensus, which ends when probabilities change less than this
RESAMPLED_STEPS = 30  # for rows drawn anew, from the fit to all rows


@dataclass(frozen=True)
class NoiseRate:
    """rate, low, high: the share of wrong labels and its 95 % interval; transition: float64 [K, K], P(given | true)."""

    rate: float
    low: float
    high: float
    transition: np.ndarray


def estimate(
    labels: np.ndarray, num_classes: int, probs=None, features=None, method: str = "joint", bootstrap: int = 100,
    seed: int = 0, neighbours: Neighbours | None = None,
) -> NoiseRate:  # fmt: skip
    """Return the estimated share of wrong labels among the given ones, int64 [N], and how they go wrong.

    method: "joint", from out-of-fold `probs`, float [N, K], by the calibrated confident joint (Northcutt et al. 2021,
    arXiv 1911.00068, equation 3); "clusterability", from `features`, float [N, D], or from `neighbours`, what
    `neighbours.nearest` found among them: see `consensus`. The interval is 1.96 standard deviations of the rate over
    `bootstrap` resampled sets of rows to either side: it holds the error of drawing rows, not that of a bad network.
    A class that nobody truly has is given as itself. Neither method can detect noise in which most labels of a class
    are one other class. Raises InputError for an input that is missing or wrong, and for labels of a single class.
    """
    one_of("method", method, METHODS)
    used = {"probs": probs} if method == "joint" else {"features": features, "neighbours": neighbours}
    used, labels = {name: np.asarray(array) for name, array in used.items() if array is not None}, np.asarray(labels)
    if not used:
        raise InputError(f"method '{method}' needs {'probs' if method == 'joint' else 'features or neighbours'}")
    if bootstrap < 2:
        raise InputError(f"bootstrap is {bootstrap}; an interval needs 2 draws at least")
    check(labels, **used)
    if len(np.unique(labels)) < 2:
        raise InputError("there is only one class among the given labels: nothing to tell apart")
    check_classes(labels, num_classes)
    labels, n = labels.astype(np.int64, copy=False), len(labels)
    if method == "joint":
        if used["probs"].shape[1] != num_classes:
            raise InputError(f"probs has {used['probs'].shape[1]} columns for {num_classes} classes")
        rows, counts = probabilities.read(labels, used["probs"]), np.ones(n)
        joint_of = partial(probabilities.joint, labels, used["probs"], rows)
    else:
        if n < 3:
            raise InputError(f"neighbours of 3 rows at least are compared; there are {n}")
        index = first_k(neighbours, used.get("features"), 2)[1]
        counts, joint_of = _consensus(labels, index, num_classes)
        n = max(1, n // 3)  # each label stands in three triples
    joint = joint_of(None)
    rng, shares = np.random.default_rng(seed), counts / counts.sum()
    resampled = [wrong_share(joint_of(rng.multinomial(n, shares))) for _ in range(bootstrap)]
    rate, reach = wrong_share(joint), 1.96 * np.std(resampled, ddof=1)
    return NoiseRate(rate, max(0.0, rate - reach), min(1.0, rate + reach), transition(joint))


def wrong_share(joint: np.ndarray) -> float:
    """Return the share of wrong labels in `joint`, counts or shares [given, true]."""
    return max(0.0, float(1 - joint.trace() / joint.sum()))


def transition(joint: np.ndarray) -> np.ndarray:
    """Return float64 [true, given]: P(given | true) of `joint`, [given, true]; a class without rows stays itself."""
    sizes = joint.sum(0)
    return np.where(sizes[:, None] > 0, joint.T / np.where(sizes > 0, sizes, 1)[:, None], np.eye(len(joint)))


def consensus(labels: np.ndarray, index: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the joint float64 [given, true], sum 1, that explains how labels agree with those of two neighbours.

    index: int64 [N, 2], the rows nearest to each. Zhu, Song & Liu 2021 (HOC, arXiv 2102.05291): if a row and its two
    nearest neighbours are of one true class, and each label goes wrong independently, the shares of all triples of
    labels follow from P(true) and P(given | true) (section 3), and three labels suffice to find these. The paper
    descends on the squared difference of the shares; we maximise their likelihood (Dawid & Skene 1979), which needs no
    step size. Neighbours of other classes count as noise, so the estimate is then too high.
    """
    return _consensus(labels, index, num_classes)[1](None)


def _consensus(labels: np.ndarray, index: np.ndarray, num_classes: int) -> tuple[np.ndarray, Callable]:
    """Return (counts [U] of the distinct triples, function that returns the joint for other counts; None for these)."""
    present, y = np.unique(labels, return_inverse=True)
    k = len(present)
    triples, counts = np.unique(np.sort(y[np.column_stack([np.arange(len(y)), index])], 1), axis=0, return_counts=True)
    triples = torch.from_numpy(triples.T.copy())  # [3, U]
    start = (0.6 * np.eye(k) + 0.4 / k) * (np.bincount(y) / len(y))
    whole = _maximise(triples, torch.from_numpy(counts), torch.from_numpy(start), MAX_STEPS)

    def joint_of(weights: np.ndarray | None) -> np.ndarray:
        joint, found = np.zeros((num_classes, num_classes)), whole
        if weights is not None:
            drawn = torch.from_numpy(np.flatnonzero(weights))
            found = _maximise(triples[:, drawn], torch.from_numpy(weights)[drawn], whole, RESAMPLED_STEPS)
        joint[np.ix_(present, present)] = found.numpy()
        return joint

    return counts, joint_of


def _maximise(triples: torch.Tensor, counts: torch.Tensor, joint: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the joint float64 [given, true] after expectation-maximisation from `joint`; triples: int64 [3, U]."""
    tiny = torch.finfo(joint.dtype).tiny
    for _ in range(steps):
        prior = joint.sum(0).clamp(min=tiny)
        true = joint[triples[0]] * (joint[triples[1]] / prior) * (joint[triples[2]] / prior)  # [U, K]
        true *= (counts / true.sum(1).clamp(min=tiny))[:, None]
        before, joint = joint, torch.zeros_like(joint)
        for given in triples:
            joint.index_add_(0, given, true)
        joint /= joint.sum()
        if (joint - before).abs().sum() < TOLERANCE:
            break
    return joint
