"""How likely each label is to be wrong, from a model of the given labels that is fitted to them alone."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, softmax
from sklearn.isotonic import IsotonicRegression

from ptglab.detect import noise_rate, probabilities
from ptglab.detect.features import log_likelihoods, num_classes
from ptglab.detect.neighbours import Neighbours, first_k, vote
from ptglab.detect.suspects import Suspects, flag

Views = dict[str, np.ndarray]
ROUNDS, STEPS = 30, 3  # of the fit: weights, then steps of expectation-maximisation for the transition matrix
TOLERANCE = 1e-3  # of the weights, which end the fit when they change less than this
PRIOR = 0.1  # labels that each entry of the transition matrix weighs before any are seen, times the number of classes
FITTED = 1 << 20  # probabilities that a model is fitted to, of rows spread evenly over the set
CHANCE = 0.05  # of the way from chance to full agreement: predictions closer to chance know nothing
ODDS = 0.5  # standard deviation of the log odds' common error, over sets with truth: tests/bench/test_first_suspects


def views_of(labels: np.ndarray, probs, features, neighbours: Neighbours | None) -> tuple[Views, np.ndarray]:
    """Return (views, joint): what the inputs say of every row and class, and how many labels [given, true] go wrong.

    Views are float [N, K]: probs; votes of 20 neighbours and of 10; logs, the log likelihoods; belief, the mean of
    probs and votes; and the thresholds [K] of confident learning. Of two joints it is the one with fewer wrong labels:
    a poor input counts its own mistakes too.
    """
    views, joints, k = {}, [], num_classes(labels) if probs is None else probs.shape[1]
    if probs is not None:
        rows = probabilities.read(labels, probs)
        views |= {"probs": probs, "thresholds": probabilities.class_thresholds(labels, rows.own, k)}
        joints.append(probabilities.joint(labels, probs, rows))
    if features is not None or neighbours is not None:
        similarity, index = first_k(neighbours, features, 20)
        for name, first in (("votes", 20), ("votes_of_10", 10)):
            views[name] = vote(similarity[:, :first], labels[index[:, :first]], k)
        joints.append(noise_rate.consensus(labels, index[:, :2], k) * len(labels))
    if features is not None:
        views["logs"] = log_likelihoods(labels, features, k)
    views["belief"] = np.mean([views[name] for name in ("probs", "votes") if name in views], 0)
    return views, min(joints, key=noise_rate.wrong_share)


def wrong(labels: np.ndarray, views: Views) -> Callable:
    """Return the function (rows [M], labels [M]) -> probability [M] that these labels of these rows are wrong.

    A model says P(given = y | row) = sum over j of z_j T[j, y], where z is the softmax of a weighted sum of the logs of
    some views, and T the transition matrix: a noise layer on calibrated outputs (Goldberger & Ben-Reuven 2017,
    equation 1). Weights and T maximise the likelihood of the given labels, which no view but the logs has seen; T by
    expectation-maximisation from a prior of equal confusions at the model's own rate. The probability is 1 - P(true = y
    | given = y, row), the mean of two models: of the first view alone, and of all views together. The noise is taken to
    depend on the class alone; mistakes of people on images that are hard to tell are more than it counts.
    """
    k = views["belief"].shape[1]
    logs = [np.log(views[name] + floor) for name, floor in (("probs", 1e-6), ("votes", 0.02)) if name in views]
    if "logs" in views:
        logs.append(((views["logs"] - views["logs"].max(1, keepdims=True)) / 10).clip(-60))
    step = -(-len(labels) * k // FITTED)
    models = []
    for used in (logs[:1], logs)[: len(logs)]:
        weights, transition = _fit(np.stack([each[::step] for each in used]), labels[::step])
        z = softmax(sum(float(w) * each for w, each in zip(weights, used, strict=True)), axis=1)
        models.append((z, transition.astype(np.float32)))

    def probability(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        right = [z[rows, labels] * t[labels, labels] / (z[rows] * t[:, labels].T).sum(1).clip(1e-30) for z, t in models]
        return (1 - np.mean(right, 0)).clip(0, 1)

    return probability


def _fit(logs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (weights [V], T [true, given]) of the model of `wrong` for views `logs`, [V, N, K]."""
    size, n, k = logs.shape
    weights, t, given = np.full(size, 1 / size), _confusions(0.1, k), np.eye(k)[labels]

    def responsibilities(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = softmax(np.tensordot(weights, logs, 1), axis=1)
        joint = z * (given @ t.T)
        total = joint.sum(1, keepdims=True).clip(1e-30)
        return z, joint / total, total

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z, true, total = responsibilities(weights)
        return -np.log(total).mean(), ((z - true) * logs).sum((1, 2)) / n

    for _ in range(ROUNDS):
        before = weights
        bounds, options = [(0, 50)] * size, {"maxiter": 5}
        weights = minimize(loss, weights, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        for _ in range(STEPS):
            counts = responsibilities(weights)[1].T @ given  # [true, given]
            t = counts + PRIOR * k * k * _confusions(noise_rate.wrong_share(counts), k)
            t /= t.sum(1, keepdims=True)
        if np.abs(weights - before).max() < TOLERANCE:
            break
    return weights, t


def _confusions(rate: float, k: int) -> np.ndarray:
    """Return [K, K]: `rate` spread equally over the other classes, in every row."""
    return np.full((k, k), rate / (k - 1)) + (1 - rate - rate / (k - 1)) * np.eye(k)


def posterior(found: Suspects, labels, probs=None, features=None, neighbours: Neighbours | None = None) -> np.ndarray:
    """Return float32 [N]: the probability that each label is wrong, which never rises with the score of `found`.

    It is the isotonic regression of `wrong` on the score, so that the first suspects are also the likeliest. labels:
    the given ones, int64 [N]; probs, features and neighbours are those that `found` was made from, one at least.
    """
    labels = np.asarray(labels, np.int64)
    p = wrong(labels, views_of(labels, probs, features, neighbours)[0])(np.arange(len(labels)), labels)
    return IsotonicRegression(increasing=False).fit_transform(found.score, p).clip(0, 1).astype(np.float32)


def first(posterior: np.ndarray, n: int) -> tuple[float, float, float]:
    """Return (expected, low, high): the share of wrong labels among the `n` likeliest ones, with a 95 % interval.

    The interval holds two errors: whether each of the n is wrong is chance, and the odds of all may be wrong by one
    factor, since the rate is estimated: ODDS for the model, and as many wrong labels as there are, for the sample.
    """
    p = np.sort(np.asarray(posterior, np.float64))[::-1][:n].clip(1e-4, 1 - 1e-4)
    reach = 1.96 * np.hypot(ODDS, 1 / np.sqrt(max(1, posterior.sum(dtype=np.float64))))
    shifted = [(q.mean(), 1.96 * np.sqrt((q * (1 - q)).sum()) / len(q)) for q in expit(logit(p) + [[-reach], [reach]])]
    (low, below), (high, above) = shifted
    return float(p.mean()), max(0.0, float(low - below)), min(1.0, float(high + above))


def flag_by_precision(found: Suspects, posterior: np.ndarray, precision: float, labels, belief) -> Suspects:
    """Return `found` with as many labels flagged, the first ones, as are expected to be wrong with that `precision`.

    posterior: what `posterior` returned; labels: the given ones, int64 [N]; belief: float [N, K], what suggestions are
    made from. Nothing is flagged if even the first label is less likely to be wrong.
    """
    p = np.asarray(posterior, np.float64)[np.argsort(found.score, kind="stable")]
    enough = np.flatnonzero(p.cumsum() >= precision * np.arange(1, len(p) + 1))
    return flag(found, int(enough[-1]) + 1 if len(enough) else 0, labels, belief)


def knowledge(labels, probs: np.ndarray, features: np.ndarray | None = None) -> str:
    """Return "", or the sentence that says why nothing is known of which labels, int64 [N], are wrong.

    Nothing is known if no class has more than 2 images, if all rows of `features`, [N, D], are the same, or if the
    likeliest class by out-of-fold `probs`, float [N, K], is the given one no more often than by chance: within 3
    standard deviations of the agreement of shuffled labels, or CHANCE of the way from there to full agreement.
    """
    labels = np.asarray(labels, np.int64)
    n, sizes, best = len(labels), np.bincount(labels, minlength=probs.shape[1]), probs.argmax(1)
    if sizes.max() <= 2:
        return "No class has more than 2 images, so nothing is known of which labels are wrong."
    if features is not None and not np.ptp(features, axis=0).max() > 1e-6 * max(1e-6, np.abs(features).max()):
        return "All images look the same to the network, so nothing is known of which labels are wrong."
    agreed, chance = (best == labels).mean(), (np.bincount(best, minlength=len(sizes)) @ sizes) / n**2
    if agreed <= chance + max(3 * np.sqrt(chance * (1 - chance) / n), CHANCE * (1 - chance)):
        return (
            f"Predictions agree with {agreed:.0%} of the labels, and would with {chance:.0%} by chance, so nothing is "
            "known of which labels are wrong."
        )
    return ""
