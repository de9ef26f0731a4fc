"""Detectors that read features: how near rows are labelled, and how dense each class lies where a row is."""

import numpy as np
from scipy.special import softmax

from ptglab.detect import neighbours, noise_rate
from ptglab.detect import probabilities as confident
from ptglab.detect.neighbours import Near
from ptglab.detect.suspects import Suspects, class_rows, suspects

KEPT, MOST = 0.95, 64  # of the features' variance, and of the directions that hold it: the rest is noise
FITS = 8  # of the densities, each with the weights that the last one gives


def neighbour_votes(
    labels: np.ndarray, features: np.ndarray | None, num_classes: int, k: int, near: Near | None = None
) -> np.ndarray:
    """Return float32 [N, K]: how the `k` nearest other rows vote, by their given labels."""
    similarity, index = neighbours.first(near, features, k)
    return neighbours.vote(similarity, labels[index], num_classes)


def knn(labels: np.ndarray, features: np.ndarray | None, near: Near | None = None, k: int = 20) -> Suspects:
    """Flag labels that their `k` nearest neighbours outvote; the score is its vote less the largest other.

    Neighbours by cosine similarity of `features`, the row itself left out, or the first of `near`. Zhu et al. 2022
    (arXiv 2110.06283), the local vote of section 3.2, with weights by similarity.
    """
    votes = neighbour_votes(labels, features, num_classes(labels), k, near)
    rows = confident.read(labels, votes)
    margin = confident.margin(labels, votes, rows)
    return suspects(labels, votes, margin, margin < -confident.TIE, rows.best)


def simifeat(labels: np.ndarray, features: np.ndarray | None, near: Near | None = None, k: int = 10) -> Suspects:
    """Flag in each class the labels least like their neighbours', as many as `noise_rate.consensus` estimates wrong.

    The score is the cosine of the neighbours' vote [K] with the given label. SimiFeat-R of Zhu, Dong & Liu 2022
    (arXiv 2110.06283), section 3.3; votes count by similarity, as in `knn`, which leaves few ties, and there is one
    round on features as they are, where theirs are many on augmented images.
    """
    similarity, index = neighbours.first(near, features, k)
    votes = neighbours.vote(similarity, labels[index], num_classes(labels))
    score = cosine(votes)[np.arange(len(labels)), labels]
    joint = noise_rate.consensus(labels, index[:, :2], votes.shape[1])
    flagged = np.zeros(len(labels), bool)
    for j, rows in enumerate(class_rows(labels, votes.shape[1])):
        wrong = 1 - joint[j, j] / joint[j].sum() if len(rows) else 0
        flagged[rows[np.argsort(score[rows], kind="stable")[: round(wrong * len(rows))]]] = True
    return suspects(labels, votes, score, flagged)


def density(labels: np.ndarray, features: np.ndarray, ratio: float = 2.0) -> Suspects:
    """Flag labels under which a row is less than 1 / `ratio` times as likely as under another; the score is the log.

    After ALED (Chaudhry et al. 2026, arXiv 2601.10084): features are denoised, each class is a normal distribution
    fitted robustly, and a likelihood ratio decides. See `log_likelihoods`.
    """
    logs = log_likelihoods(labels, features, num_classes(labels))
    score = margins(logs)[np.arange(len(labels)), labels]
    return suspects(labels, logs, score, score < -np.log(ratio))


def log_likelihoods(labels: np.ndarray, features: np.ndarray, num_classes: int) -> np.ndarray:
    """Return float32 [N, K]: the log density of each row under each class, up to a constant; -inf for an empty class.

    Features are projected on their principal directions. Each class is a normal distribution; it starts from the
    median of its rows, then each row counts in the class it is labelled as by the probability of that class there, so
    that wrong labels drop out. A covariance is drawn towards the pooled one as by as many rows as there are directions:
    a class may have fewer. ALED (Chaudhry et al. 2026, arXiv 2601.10084) projects two classes on the line between
    their means and random lines, and trims each class to its densest half (the minimum covariance determinant).
    """
    x, classes = principal(features), class_rows(labels, num_classes)
    middle = np.stack([np.median(x[rows], 0) if len(rows) else x[0] for rows in classes])
    weights, size = np.ones(len(x)), x.shape[1]
    floor = 1e-6 * max(np.square(x).mean(), 1e-12) * np.eye(size)
    within = _scatter(x - middle[labels], weights) / len(x) + floor
    spread = np.repeat(within[None], num_classes, 0)  # [K, D, D]
    for step in range(FITS):
        if step:
            total = np.bincount(labels, weights, num_classes)[:, None] + 1e-3
            sums = np.stack([weights[rows] @ x[rows] for rows in classes])
            middle = (sums + 1e-3 * middle) / total
            apart = x - middle[labels]
            within = _scatter(apart, weights) / weights.sum() + floor
            scatter = np.stack([_scatter(apart[rows], weights[rows]) for rows in classes])
            spread = (scatter + size * within) / (total[..., None] + size)
        logs = _log_densities(x, middle, spread)
        logs[:, [not len(rows) for rows in classes]] = -np.inf
        weights = softmax(logs, axis=1)[np.arange(len(x)), labels].clip(1e-6)
    return logs


def principal(features: np.ndarray) -> np.ndarray:
    """Return float64 [N, D']: `features` along the fewest principal directions that hold most of their variance."""
    x = features - features.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(x.T @ x)
    held = values[::-1].clip(min=0).cumsum()
    enough = 1 + int((held < KEPT * held[-1]).sum())
    return x @ vectors[:, ::-1][:, : min(enough, MOST)]


def _scatter(apart: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (apart * weights[:, None]).T @ apart


def _log_densities(x: np.ndarray, middle: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return float32 [N, K]: of x [N, D] under normal distributions of means [K, D] and covariances [K, D, D]."""
    logs, x = np.empty((len(x), len(middle)), np.float32), x.astype(np.float32)
    for j, root in enumerate(np.linalg.cholesky(spread)):
        whitened = (x - middle[j].astype(np.float32)) @ np.linalg.inv(root).T.astype(np.float32)
        logs[:, j] = -np.square(whitened).sum(1) / 2 - np.log(root.diagonal()).sum()
    return logs


def num_classes(labels: np.ndarray) -> int:
    """Return the number of classes that the labels speak of, 2 at least."""
    return max(2, int(labels.max()) + 1)


def cosine(votes: np.ndarray) -> np.ndarray:
    """Return [N, K]: the cosine of each row of `votes`, [N, K], with each class alone."""
    return votes / np.linalg.norm(votes, axis=1, keepdims=True)


def margins(belief: np.ndarray) -> np.ndarray:
    """Return [N, K]: of each class, its value less the largest other's in the row, 1e6 where there is no other."""
    belief = np.maximum(belief, -1e6)  # a class that nobody has
    rows, best = np.arange(len(belief)), belief.argmax(1)
    others = np.repeat(belief[rows, best][:, None], belief.shape[1], 1)
    rest = belief.copy()
    rest[rows, best] = -np.inf
    others[rows, best] = rest.max(1)
    return belief - others
