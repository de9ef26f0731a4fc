"""Detectors that read features: how the nearest rows are labelled, and how dense each class is around a row."""

import numpy as np
from scipy.special import softmax

from ptglab.detect import noise_rate
from ptglab.detect.neighbours import Neighbours, first_k, vote
from ptglab.detect.probabilities import disagreement
from ptglab.detect.suspects import Suspects, class_rows, suspects

VARIANCE, MOST_DIRECTIONS = 0.95, 64  # of the features' variance, and the directions that hold it: the rest is noise
FITS = 8  # fits of the densities, each with the weights that follow from the one before
NEVER = -1e30  # log density under a class without rows


def knn(labels: np.ndarray, features=None, neighbours: Neighbours | None = None, k: int = 20) -> Suspects:
    """Flag labels that the `k` nearest other rows outvote; the score is the label's vote less the largest other one.

    Neighbours are the nearest by cosine similarity of `features` [N, D], or the first of `neighbours`. Zhu et al. 2022
    (arXiv 2110.06283), the local vote of section 3.2, with weights by similarity.
    """
    similarity, index = first_k(neighbours, features, k)
    return disagreement(labels, vote(similarity, labels[index], num_classes(labels)))


def simifeat(labels: np.ndarray, features=None, neighbours: Neighbours | None = None, k: int = 10) -> Suspects:
    """Flag in each class the labels that agree least with their neighbours, as many as are estimated to be wrong.

    The score is the cosine of the neighbours' vote [K] with the given label; the number is that of
    `noise_rate.consensus`. SimiFeat-R of Zhu, Dong & Liu 2022 (arXiv 2110.06283), section 3.3, but with votes weighted
    by similarity, and in one round, where the paper has many on augmented images.
    """
    similarity, index = first_k(neighbours, features, k)
    votes = vote(similarity, labels[index], num_classes(labels))
    score = cosine(labels, votes)
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
    return disagreement(labels, log_likelihoods(labels, features, num_classes(labels)), np.log(ratio))


def log_likelihoods(labels: np.ndarray, features: np.ndarray, num_classes: int) -> np.ndarray:
    """Return float32 [N, K]: the log density of each row under each class, up to a constant; NEVER for an empty class.

    Features are projected on their principal directions. Each class is a normal distribution that starts from the
    median of its rows; then each row is weighted by the probability of its label there, so that wrong labels drop out
    (ALED trims each class to its densest half). A covariance is shrunk towards the pooled one as if by D more rows, as
    a class may have fewer rows than directions.
    """
    x, classes = principal(features), class_rows(labels, num_classes)
    means = np.stack([np.median(x[rows], 0) if len(rows) else x[0] for rows in classes])
    weights, size = np.ones(len(x)), x.shape[1]
    small, logs = x.astype(np.float32), np.empty((len(x), num_classes), np.float32)
    floor = 1e-6 * max(np.square(x).mean(), 1e-12) * np.eye(size)
    for fit in range(FITS):
        if fit:
            total = np.bincount(labels, weights, num_classes)[:, None] + 1e-3
            means = (np.stack([weights[rows] @ x[rows] for rows in classes]) + 1e-3 * means) / total
        residuals = x - means[labels]
        pooled = _scatter(residuals, weights) / weights.sum() + floor
        covariances = np.repeat(pooled[None], num_classes, 0)  # [K, D, D]
        if fit:
            scatter = np.stack([_scatter(residuals[rows], weights[rows]) for rows in classes])
            covariances = (scatter + size * pooled) / (total[..., None] + size)
        for j, root in enumerate(np.linalg.cholesky(covariances)):
            whitened = (small - means[j].astype(np.float32)) @ np.linalg.inv(root).T.astype(np.float32)
            logs[:, j] = -np.square(whitened).sum(1) / 2 - np.log(root.diagonal()).sum()
        logs[:, [not len(rows) for rows in classes]] = NEVER
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


def num_classes(labels: np.ndarray) -> int:
    """Return the number of classes among the labels, at least 2."""
    return max(2, int(labels.max()) + 1)


def cosine(labels: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Return [N]: the cosine of each row of `votes`, [N, K], with the one-hot vector of its label."""
    return votes[np.arange(len(labels)), labels] / np.linalg.norm(votes, axis=1)
