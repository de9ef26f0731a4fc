"""Detectors that read features: how the nearest rows are labelled, and how dense each class is around a row."""

import numpy as np
from scipy.special import softmax

from ptglab.detect import noise_rate, probabilities
from ptglab.detect.neighbours import Neighbours, first_k, vote
from ptglab.detect.suspects import Suspects, class_rows, suspects

VARIANCE, MOST_DIRECTIONS = 0.95, 64  # of the features' variance, and the directions that hold it: the rest is noise
FITS = 8  # fits of the densities, each with the weights that follow from the one before


def knn(labels: np.ndarray, features=None, neighbours: Neighbours | None = None, k: int = 20) -> Suspects:
    """Flag labels that the `k` nearest other rows outvote; the score is the label's vote less the largest other one.

    Neighbours are the nearest by cosine similarity of `features` [N, D], or the first of `neighbours`. Zhu et al. 2022
    (arXiv 2110.06283), the local vote of section 3.2, with weights by similarity.
    """
    similarity, index = first_k(neighbours, features, k)
    votes = vote(similarity, labels[index], num_classes(labels))
    rows = probabilities.read(labels, votes)
    margin = probabilities.margin(labels, votes, rows)
    return suspects(labels, votes, margin, margin < -probabilities.TIE, rows.best)


def simifeat(labels: np.ndarray, features=None, neighbours: Neighbours | None = None, k: int = 10) -> Suspects:
    """Flag in each class the labels that agree least with their neighbours, as many as are estimated to be wrong.

    The score is the cosine of the neighbours' vote [K] with the given label; the number in each class is that of
    `noise_rate.consensus`. SimiFeat-R of Zhu, Dong & Liu 2022 (arXiv 2110.06283), section 3.3. Votes are weighted by
    similarity, as in `knn`, which leaves few ties; there is one round, on features as they are, where the paper has
    many on augmented images.
    """
    similarity, index = first_k(neighbours, features, k)
    votes = vote(similarity, labels[index], num_classes(labels))
    score = cosine(votes)[np.arange(len(labels)), labels]
    joint = noise_rate.consensus(labels, index[:, :2], votes.shape[1])
    flagged = np.zeros(len(labels), bool)
    for j, rows in enumerate(class_rows(labels, votes.shape[1])):
        wrong = 1 - joint[j, j] / joint[j].sum() if len(rows) else 0
        flagged[rows[np.argsort(score[rows], kind="stable")[: round(wrong * len(rows))]]] = True
    return suspects(labels, votes, score, flagged)


def density(labels: np.ndarray, features: np.ndarray, ratio: float = 2.0) -> Suspects:
    """Flag labels whose class is more than `ratio` times less likely at the row than another; the score is the log.

    After ALED (Chaudhry et al. 2026, arXiv 2601.10084): features are denoised, a normal distribution is fitted
    robustly to each class, and a likelihood ratio decides. See `log_likelihoods`.
    """
    logs = log_likelihoods(labels, features, num_classes(labels))
    score = margins(logs)[np.arange(len(labels)), labels]
    return suspects(labels, logs, score, score < -np.log(ratio))


def log_likelihoods(labels: np.ndarray, features: np.ndarray, num_classes: int) -> np.ndarray:
    """Return float32 [N, K]: the log density of each row under each class, up to a constant; -inf for an empty class.

    Features are projected on their principal directions. Each class is a normal distribution that starts from the
    median of its rows; then each row is weighted by the probability of its label there, so that wrong labels drop out.
    A covariance is shrunk towards the pooled one as if by D more rows: a class may have fewer rows than directions.
    ALED (Chaudhry et al. 2026, arXiv 2601.10084) projects pairs of classes on the line between their means and on
    random lines, and trims each class to its densest half (the minimum covariance determinant).
    """
    x, classes = principal(features), class_rows(labels, num_classes)
    means = np.stack([np.median(x[rows], 0) if len(rows) else x[0] for rows in classes])
    weights, size = np.ones(len(x)), x.shape[1]
    floor = 1e-6 * max(np.square(x).mean(), 1e-12) * np.eye(size)
    pooled = _scatter(x - means[labels], weights) / len(x) + floor
    covariances = np.repeat(pooled[None], num_classes, 0)  # [K, D, D]
    for step in range(FITS):
        if step:
            total = np.bincount(labels, weights, num_classes)[:, None] + 1e-3
            sums = np.stack([weights[rows] @ x[rows] for rows in classes])
            means = (sums + 1e-3 * means) / total
            residuals = x - means[labels]
            pooled = _scatter(residuals, weights) / weights.sum() + floor
            scatter = np.stack([_scatter(residuals[rows], weights[rows]) for rows in classes])
            covariances = (scatter + size * pooled) / (total[..., None] + size)
        logs = log_densities(x, means, covariances)
        logs[:, [not len(rows) for rows in classes]] = -np.inf
        weights = softmax(logs, axis=1)[np.arange(len(x)), labels].clip(1e-6)
    return logs


def principal(features: np.ndarray) -> np.ndarray:
    """Return float64 [N, D']: `features` along the fewest principal directions that hold most of their variance."""
    x = features - features.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(x.T @ x)
    held = values[::-1].clip(min=0).cumsum()
    enough = 1 + int((held < VARIANCE * held[-1]).sum())
    return x @ vectors[:, ::-1][:, : min(enough, MOST_DIRECTIONS)]


def _scatter(residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (residuals * weights[:, None]).T @ residuals


def log_densities(x: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """Return float32 [N, K]: of x [N, D] under normal distributions of `means` [K, D] and `covariances` [K, D, D]."""
    logs, x = np.empty((len(x), len(means)), np.float32), x.astype(np.float32)
    for j, root in enumerate(np.linalg.cholesky(covariances)):
        whitened = (x - means[j].astype(np.float32)) @ np.linalg.inv(root).T.astype(np.float32)
        logs[:, j] = -np.square(whitened).sum(1) / 2 - np.log(root.diagonal()).sum()
    return logs


def num_classes(labels: np.ndarray) -> int:
    """Return the number of classes among the labels, at least 2."""
    return max(2, int(labels.max()) + 1)


def cosine(votes: np.ndarray) -> np.ndarray:
    """Return [N, K]: the cosine of each row of `votes`, [N, K], with the one-hot vector of each class."""
    return votes / np.linalg.norm(votes, axis=1, keepdims=True)


def margins(belief: np.ndarray) -> np.ndarray:
    """Return [N, K]: the value of each class less the largest other one in the row; -inf counts as -1e6."""
    belief = np.maximum(belief, -1e6)  # -inf is a class without rows
    rows, best = np.arange(len(belief)), belief.argmax(1)
    others = np.repeat(belief[rows, best][:, None], belief.shape[1], 1)
    rest = belief.copy()
    rest[rows, best] = -np.inf
    others[rows, best] = rest.max(1)
    return belief - others
