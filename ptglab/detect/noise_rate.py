"""How many of the given labels are wrong, and which class is given for which, estimated without the truth."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit, logit

from ptglab.detect import probabilities
from ptglab.detect.neighbours import Neighbours, first_k
from ptglab.detect.suspects import check, check_classes
from ptglab.errors import InputError, one_of

METHODS = ("joint", "clusterability")
MAX_STEPS, TOLERANCE = 500, 1e-5  # of the fit to the consensus, which ends when probabilities change less than this
DISTRUST = 0.6  # the least with which the interval held the true share of all 19 sets it was measured on
HARD = 0.015  # the share that is counted as wrong on 128 to 5,000 photographs without a wrong label, and more
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

    method: "joint", from out-of-fold `probs`, float [N, K], by the confident joint (Northcutt et al. 2021, arXiv
    1911.00068, equation 3); "clusterability", by `consensus`, from `features`, float [N, D], or from what
    `neighbours.nearest` found among them. The interval is 1.96 standard deviations of the rate over `bootstrap` sets of
    resampled rows to either side, so it does not hold the error of a bad network. Neither method can detect noise in
    which most labels of a class are one other class. Raises InputError for missing or wrong inputs and a single class.
    """
    one_of("method", method, METHODS)
    labels, rng, fewest = np.asarray(labels), np.random.default_rng(seed), 2 if method == "joint" else 3
    read = {"probs": probs} if method == "joint" else {"features": features, "neighbours": neighbours}
    used = {name: array for name, array in read.items() if array is not None}
    used = {name: array if name == "neighbours" else np.asarray(array) for name, array in used.items()}
    if not used:
        raise InputError(f"method '{method}' needs {' or '.join(read)}")
    check(labels, **used)
    n, found = len(labels), len(np.unique(labels))
    if n < fewest or found < 2 or bootstrap < 2:
        needed = f"2 draws of {fewest} labels of 2 classes are the fewest"
        raise InputError(f"bootstrap is {bootstrap}, and {n} labels are of {found} classes: {needed}")
    check_classes(labels, num_classes)
    labels = labels.astype(np.int64, copy=False)
    if method == "joint":
        if used["probs"].shape[1] != num_classes:
            raise InputError(f"probs has {used['probs'].shape[1]} columns for {num_classes} classes")
        rows = probabilities.read(labels, used["probs"])
        joint = probabilities.joint(labels, used["probs"], rows)
        draws = (rng.multinomial(n, np.full(n, 1 / n)) for _ in range(bootstrap))
        resampled = [probabilities.joint(labels, used["probs"], rows, weights) for weights in draws]
    else:
        index = first_k(neighbours, used.get("features"), 2)[1]
        triples, counts, start = _triples(labels, index, num_classes)
        joint = _maximise(triples, counts, start, MAX_STEPS)
        independent, shares = max(1, n // 3), counts / counts.sum()  # each label stands in three triples
        draws = (rng.multinomial(independent, shares) for _ in range(bootstrap))
        resampled = [_maximise(triples[:, w > 0], w[w > 0], joint, RESAMPLED_STEPS) for w in draws]
    rate, reach = wrong_share(joint), 1.96 * np.std([wrong_share(drawn) for drawn in resampled], ddof=1)
    return NoiseRate(rate, max(0.0, rate - reach), min(1.0, rate + reach), transition(joint))


def interval(rate: float, estimates: Iterable[NoiseRate], n: int) -> tuple[float, float]:
    """Return (low, high), a 95 % interval around `rate`, a better method's share of wrong labels among `n`.

    On the scale of log odds it reaches the sample's error to either side, and for the error of the inputs DISTRUST
    times the mean distance of `estimates`: where inputs tell classes apart, all methods agree. Below, it reaches HARD
    further, as images that are hard to tell are counted even where no label is wrong.
    """
    middle, *others = (logit(np.clip(r, 0.5 / n, 1 - 0.5 / n)) for r in [rate, *(each.rate for each in estimates)])
    reach = np.hypot(DISTRUST * np.abs(np.array(others) - middle).mean(), 1.96 / np.sqrt(max(1, n * rate)))
    return max(0.0, float(expit(middle - reach)) - HARD), max(float(rate), float(expit(middle + reach)))


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
    labels determine P(true) and P(given | true) (section 3). The paper descends on the squared difference of the
    shares; we maximise their likelihood (Dawid & Skene 1979). Neighbours of other classes count as noise.
    """
    return _maximise(*_triples(labels, index, num_classes), MAX_STEPS)


def _triples(labels: np.ndarray, index: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (distinct triples of labels int64 [3, U], their counts [U], joint [given, true] to start from)."""
    triples = np.sort(labels[np.column_stack([np.arange(len(labels)), index])], 1)
    triples, counts = np.unique(triples, axis=0, return_counts=True)
    sizes = np.bincount(labels, minlength=num_classes)
    start = 0.6 * np.eye(num_classes) + 0.4 / np.count_nonzero(sizes)
    return triples.T, counts, np.where(sizes[:, None] > 0, start * (sizes / len(labels)), 0)


def _maximise(triples: np.ndarray, counts: np.ndarray, joint: np.ndarray, steps: int) -> np.ndarray:
    """Return the joint float64 [given, true] after expectation-maximisation from `joint`; triples: int64 [3, U]."""
    triples, counts, joint = (torch.from_numpy(np.ascontiguousarray(array)) for array in (triples, counts, joint))
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
    return joint.numpy()
