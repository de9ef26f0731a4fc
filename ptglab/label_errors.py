"""Detectors of wrong labels: the labels in hand with probabilities or features in, `Suspects` out.

No detector sees a true label. `probs` must be out of fold: a network that saw a label vouches for it.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from sklearn.neural_network import MLPClassifier

from ptglab import neighbours
from ptglab.errors import InputError, one_of

TIE = 1e-6  # probabilities closer than this count as equal
PARTS = 4  # of the rows that each thread takes, so that none waits long for another


@dataclass(frozen=True)
class Suspects:
    """score: float32 [N], low = suspicious; flagged: bool [N]; suggested: int64 [N], the label to put instead."""

    score: np.ndarray
    flagged: np.ndarray
    suggested: np.ndarray


def detect(
    name: str,
    labels: np.ndarray,
    probs: np.ndarray | None = None,
    features: np.ndarray | None = None,
    history: np.ndarray | None = None,
    seed: int = 0,
    **options,
) -> Suspects:
    """Run the detector `name` on `labels`, the given ones, int64 [N].

    probs: out-of-fold float [N, K]; features: float [N, D]; history: float [E, N] margins over epochs; DETECTORS says
    which of them each needs; `options` are the detector's own keyword arguments. Raises InputError for an unknown name,
    for an input that is missing, of the wrong length or not finite, for labels outside 0 to K - 1, and for too few
    classes or rows.
    """
    detector = DETECTORS[one_of("detector", name, DETECTORS)]
    labels = np.asarray(labels)
    inputs = {"probs": probs, "features": features, "history": history}
    for need in detector.needs:
        array = inputs[need]
        if array is None:
            raise InputError(f"detector '{name}' needs {need}")
        rows = array.shape[1] if need == "history" else len(array)
        if rows != len(labels):
            raise InputError(f"{need} has {rows} rows for {len(labels)} labels")
        if need != "probs" and not np.isfinite(array).all():
            raise InputError(f"{need} holds values that are not finite")
    if len(labels) < detector.rows:
        raise InputError(f"detector '{name}' needs at least {detector.rows} rows; there are {len(labels)}")
    if labels.min() < 0:
        raise InputError(f"labels run from {labels.min()} to {labels.max()}; they start at 0")
    if probs is not None and not labels.max() < probs.shape[1] >= 2:
        raise InputError(
            f"labels run from {labels.min()} to {labels.max()}; the probabilities have {probs.shape[1]} classes"
        )
    if detector.seeded:
        options["seed"] = seed
    return detector.find(labels, *(np.asarray(inputs[need]) for need in detector.needs), **options)


def confidence(labels: np.ndarray, probs: np.ndarray, share: float = 0.5) -> Suspects:
    """Flag labels whose own probability is below `share` of the mean one in their class; the score is that probability.

    The "self-confidence" of Northcutt et al. 2021 (arXiv 1911.00068), section 3. The threshold follows the class,
    because a head fitted on noisy labels is the less sure of any label the more of them are wrong.
    """
    read = _read(labels, probs)
    thresholds = _class_means(labels, read.own, probs.shape[1])
    return _suspects(labels, probs, read.own, read.own < share * thresholds[labels], read.best)


def disagreement(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels that are not the most probable class; the score is their probability less the largest other.

    The baseline "predicted is not given" (C_confusion) of Northcutt et al. 2021 (arXiv 1911.00068), section 4.
    """
    read = _read(labels, probs)
    margin = read.own - _largest_other(labels, probs, read)
    return _suspects(labels, probs, margin, margin < -TIE, read.best)


def confident_learning(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag the off-diagonal of the confident joint; the score is the probability of the given label.

    A row counts for class j if its probability reaches t_j, the mean probability of j among rows labelled j (the
    most probable class, if several reach theirs). Flagged: it counts for another class than its label, and its label
    is not the most probable class. Northcutt et al. 2021 (arXiv 1911.00068), equations 1 and 2.
    """
    read = _read(labels, probs)
    doubtful = read.own < read.largest - TIE
    guess = _confident(probs, _class_means(labels, read.own, probs.shape[1]), read, doubtful)
    flagged = doubtful & (guess >= 0) & (guess != labels)
    return _suspects(labels, probs, read.own, flagged, read.best)


def knn(labels: np.ndarray, features: np.ndarray, k: int = 20) -> Suspects:
    """Flag labels that their `k` nearest neighbours outvote; the score is its vote less the largest other.

    Neighbours by cosine similarity of `features`, the row itself left out. Zhu et al. 2022 (arXiv 2110.06283), the
    local vote of section 3.2, with weights by similarity.
    """
    votes = neighbour_votes(labels, features, max(2, int(labels.max()) + 1), k)
    return disagreement(labels, votes)


def auxiliary(labels: np.ndarray, probs: np.ndarray, features: np.ndarray, seed: int = 0) -> Suspects:
    """Train a small network to tell planted flips from given labels, and score the given labels with it.

    N given labels, which may be wrong, against N labels planted in the place of others, which rows and which labels
    drawn as the confident joint says labels go wrong here. That is learning from positive and unlabelled data: if
    the network's odds planted : given are o and a share r of the given labels is wrong, a label is wrong with
    probability r o, and o is 1/r wherever every label is wrong, as at the typical planted flip (Elkan & Noto 2008,
    section 2). Flagged above one half; the score is 1 less that probability.
    """
    draws = np.random.default_rng(seed)
    votes = neighbour_votes(labels, features, probs.shape[1], k=20)
    thresholds = class_thresholds(labels, probs)
    rows, planted = _plant(labels, probs, draws)
    x = np.concatenate([
        _signals(labels, probs, votes, thresholds),
        _signals(planted, probs[rows], votes[rows], thresholds),
    ])  # fmt: skip
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    is_planted = np.repeat([0, 1], len(labels))
    network = MLPClassifier((16,), alpha=1e-2, early_stopping=True, max_iter=500, random_state=seed)
    q = network.fit(x, is_planted).predict_proba(x)[:, 1].clip(1e-6, 1 - 1e-6)
    odds = q / (1 - q)
    rate = min(1.0, 1 / np.median(odds[is_planted == 1]))
    wrong = np.minimum(1, rate * odds[is_planted == 0])
    mean = (probs + votes) / 2
    return _suspects(labels, mean, 1 - wrong, wrong > 0.5, mean.argmax(1))


@dataclass(frozen=True)
class Detector:
    """A row of DETECTORS: a function of labels and, in order, of what it needs; seeded if it takes a `seed`."""

    find: Callable[..., Suspects]
    needs: tuple[str, ...]
    seeded: bool = False
    rows: int = 1  # the fewest it can work on


DETECTORS = {
    "confidence": Detector(confidence, ("probs",)),
    "disagreement": Detector(disagreement, ("probs",)),
    "confident_learning": Detector(confident_learning, ("probs",)),
    "knn": Detector(knn, ("features",), rows=2),
    "auxiliary": Detector(auxiliary, ("probs", "features"), seeded=True, rows=10),
}


def class_thresholds(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return t [K]: the mean probability of class j among rows labelled j; infinite for a class nobody has."""
    return _class_means(labels, _own(labels, probs), probs.shape[1])


def confident_class(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return int64 [N]: the class each row confidently belongs to, -1 for none; see `confident_learning`."""
    read = _read(labels, probs)
    return _confident(probs, _class_means(labels, read.own, probs.shape[1]), read, np.ones(len(labels), bool))


def neighbour_votes(labels: np.ndarray, features: np.ndarray, num_classes: int, k: int) -> np.ndarray:
    """Return float32 [N, K]: how the `k` nearest other rows vote, by their given labels."""
    similarity, index = neighbours.nearest(features, k)
    return neighbours.vote(similarity, labels[index], num_classes)


def _suspects(
    labels: np.ndarray, probs: np.ndarray, score: np.ndarray, flagged: np.ndarray, best: np.ndarray
) -> Suspects:
    """Suggest the most probable class `best`, and for a flagged label the most probable other one."""
    itself = np.flatnonzero(flagged & (best == labels))
    suggested = best.copy()
    others = probs[itself]
    others[np.arange(len(itself)), labels[itself]] = -np.inf
    suggested[itself] = others.argmax(1)
    return Suspects(score.astype(np.float32, copy=False), flagged, suggested)


@dataclass(frozen=True)
class _Read:
    """Of each row: own [N], its label's probability; largest [N], its largest one; best [N], the first such class."""

    own: np.ndarray
    largest: np.ndarray
    best: np.ndarray


def _read(labels: np.ndarray, probs: np.ndarray) -> _Read:
    """Find what the detectors ask of each row, and raise InputError if a value is not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that it could write to a read-only array; nobody does
        tensor = torch.from_numpy(np.ascontiguousarray(probs))
    if not tensor.sum().isfinite():
        raise InputError("probs holds values that are not finite")
    largest = tensor.amax(1).numpy()
    own, best = np.empty_like(largest), np.empty(len(probs), np.int64)
    _in_threads(_read_rows, labels, probs, largest, own, best)
    return _Read(own, largest, best)


@njit(nogil=True)
def _read_rows(labels, probs, largest, own, best):
    """Fill in own and best."""
    for i in range(len(labels)):
        row, first = probs[i], len(probs[i])
        for j in range(len(row)):
            first = min(first, j if row[j] == largest[i] else len(row))
        own[i], best[i] = row[labels[i]], first


def _largest_other(labels: np.ndarray, probs: np.ndarray, read: _Read) -> np.ndarray:
    """Return the largest probability of each row but its label's."""
    other = read.largest.copy()
    _in_threads(_search_others, labels, probs, read.best, other)
    return other


@njit(nogil=True)
def _search_others(labels, probs, best, other):
    """Fill in other where the label is the most probable class."""
    for i in range(len(labels)):
        if best[i] == labels[i]:
            other[i] = -np.inf
            for j in range(probs.shape[1]):
                if j != labels[i]:
                    other[i] = max(other[i], probs[i, j])


def _class_means(labels: np.ndarray, own: np.ndarray, num_classes: int) -> np.ndarray:
    """Return [K]: the mean of `own` [N] over the rows of each label, infinite where there is none."""
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    classes = np.split(_grouped(labels, own, np.append(0, ends)), ends[:-1])
    return np.array([max(values.mean(), 2 * TIE) if len(values) else np.inf for values in classes], own.dtype)


@njit(nogil=True)
def _grouped(labels, values, starts):
    """Return `values` class by class, in order within each; class j goes to starts[j] and on."""
    grouped, place = np.empty_like(values), starts.copy()
    for i in range(len(labels)):
        grouped[place[labels[i]]] = values[i]
        place[labels[i]] += 1
    return grouped


def _confident(probs: np.ndarray, thresholds: np.ndarray, read: _Read, asked: np.ndarray) -> np.ndarray:
    """Return int64 [N]: see `confident_class`; the most probable class where not `asked`, bool [N]."""
    guess = read.best.copy()
    least = thresholds - probs.dtype.type(TIE)
    _in_threads(lambda *rows: _confident_rows(least, *rows), probs, read.largest, guess, asked)
    return guess


@njit(nogil=True)
def _confident_rows(least, probs, largest, guess, asked):
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


def _own(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    return probs[np.arange(len(labels)), labels]


def _plant(labels: np.ndarray, probs: np.ndarray, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw N rows, with replacement, and a wrong label for each, as the confident joint says labels go wrong.

    A row of most probable class i is drawn in proportion to how often i is mislabelled, and gets the label j in
    proportion to how often i is given as j, but never its given label.
    """
    guess, k = confident_class(labels, probs), probs.shape[1]
    joint = np.full((k, k), 0.1)  # no pair is impossible
    np.add.at(joint, (guess[guess >= 0], labels[guess >= 0]), 1)
    shares = joint / joint.sum(1, keepdims=True)
    np.fill_diagonal(shares, 0)
    weights = shares[probs.argmax(1)]  # [N, K]
    weights[np.arange(len(labels)), labels] = 0
    rows = draws.choice(len(labels), len(labels), p=weights.sum(1) / weights.sum())
    cumulative = weights[rows].cumsum(1)
    return rows, (draws.random((len(rows), 1)) * cumulative[:, -1:] >= cumulative).sum(1)


def _signals(labels: np.ndarray, probs: np.ndarray, votes: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return float [N, 8]: what the head and the neighbours say of each label, and how sure they are at all."""
    read, voted = _read(labels, probs), _read(labels, votes)
    own, vote = read.own, voted.own
    entropy = -(probs * np.log(probs.clip(1e-12))).sum(1)
    return np.stack([
        own,
        np.log(own.clip(1e-6)),
        own - _largest_other(labels, probs, read),
        own - np.minimum(thresholds, 1)[labels],
        (probs > own[:, None]).sum(1) / probs.shape[1],
        vote,
        vote - _largest_other(labels, votes, voted),
        entropy,
    ], axis=1)  # fmt: skip
