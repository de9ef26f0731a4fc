"""Detectors that read features: against loops, and against the densities that rows were drawn from."""

import math

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from synthetic import planted
from wrong_labels import overlapping

from ptglab.detect import features as feature_detectors
from ptglab.detect import noise_rate
from ptglab.detect.features import NEVER, log_likelihoods, principal
from ptglab.detect.label_errors import detect
from ptglab.lab import metrics


def votes_by_hand(labels: np.ndarray, features: np.ndarray, k: int, num_classes: int) -> tuple[np.ndarray, list]:
    """Return votes [N, K] and for each row the others, the nearest first."""
    votes, order = np.zeros((len(labels), num_classes)), []
    for i, x in enumerate(features):
        cosines = [-2.0 if j == i else x @ y / math.sqrt((x @ x) * (y @ y)) for j, y in enumerate(features)]
        order.append(sorted(range(len(labels)), key=lambda j, cosines=cosines: -cosines[j])[:-1])
        for j in order[-1][:k]:
            votes[i, labels[j]] += math.exp(cosines[j] / 0.1)
        votes[i] /= votes[i].sum()
    return votes, order


def test_knn_by_hand():
    labels, _, _, features = planted(n=90, k=4, rate=0.3)
    votes, _ = votes_by_hand(labels, features, 7, 4)
    suspects = detect("knn", labels, features=features, k=7)
    for i, label in enumerate(labels):
        rivals = [votes[i, c] if c != label else -1 for c in range(4)]
        assert suspects.score[i] == pytest.approx(votes[i, label] - max(rivals), abs=1e-4)
        assert suspects.flagged[i] == (votes[i, label] < max(rivals))
        assert suspects.suggested[i] == np.argmax(votes[i])
    assert 0.1 < suspects.flagged.mean() < 0.6


def test_simifeat_by_hand():
    """Of each class the estimated number, of the lowest cosine between its neighbours' vote and the label."""
    labels, _, _, features = planted(n=120, k=4, rate=0.3)
    labels[labels == 2] = 3  # a class that nobody is labelled as
    votes, order = votes_by_hand(labels, features, 6, 4)
    score = [votes[i, label] / math.sqrt(sum(v * v for v in votes[i])) for i, label in enumerate(labels)]
    joint, expected = noise_rate.consensus(labels, np.array(order)[:, :2], 4), set()
    for j in (0, 1, 3):
        rows = sorted((i for i in range(120) if labels[i] == j), key=lambda i: score[i])
        count = round((1 - joint[j, j] / sum(joint[j])) * len(rows))
        assert 0 < count < len(rows)
        expected |= set(rows[:count])
    suspects = detect("simifeat", labels, features=features, k=6)
    np.testing.assert_allclose(suspects.score, score, atol=1e-4)
    assert set(np.flatnonzero(suspects.flagged)) == expected
    for i in range(120):
        others = [v if c != labels[i] or i not in expected else -1 for c, v in enumerate(votes[i])]
        assert suspects.suggested[i] == np.argmax(others)


def gaussians(rate: float, seed: int, n: int = 1500, k: int = 3, d: int = 5):
    """Return (labels, features, true labels, log densities [N, K]) of normal classes, each of a shape of its own."""
    rng = np.random.default_rng(seed)
    turns = np.linalg.qr(rng.normal(size=(k, d, d)))[0]
    means, shapes = rng.normal(scale=2, size=(k, d)), turns * rng.uniform(0.5, 1.5, (k, 1, d))
    true = rng.integers(0, k, n)
    features = means[true] + (shapes[true] @ rng.normal(size=(n, d, 1)))[..., 0]
    labels = np.where(rng.random(n) < rate, (true + rng.integers(1, k, n)) % k, true)
    logs = [multivariate_normal(m, shape @ shape.T).logpdf(features) for m, shape in zip(means, shapes, strict=True)]
    return labels, features.astype(np.float32), true, np.stack(logs, 1)


def literal_densities(labels: np.ndarray, x: np.ndarray, k: int, fits: int) -> np.ndarray:
    """Fit a normal to each class, each row weighted by its likelihood; covariances shrink to the pooled one."""
    n, d = x.shape
    weights, means, logs = [1.0] * n, [np.median(x[labels == j], 0) for j in range(k)], np.empty((n, k))
    for fit in range(fits):
        sizes = [sum(w for w, y in zip(weights, labels, strict=True) if y == j) for j in range(k)]
        if fit:
            means = [
                sum(w * row for w, row, y in zip(weights, x, labels, strict=True) if y == j) / sizes[j]
                for j in range(k)
            ]
        scatters = [np.zeros((d, d)) for _ in range(k)]
        for w, row, y in zip(weights, x, labels, strict=True):
            scatters[y] += w * np.outer(row - means[y], row - means[y])
        pooled = sum(scatters) / sum(weights)
        for j in range(k):
            covariance = (scatters[j] + d * pooled) / (sizes[j] + d) if fit else pooled
            for i, row in enumerate(x):
                logs[i, j] = -(row - means[j]) @ np.linalg.solve(covariance, row - means[j]) / 2
            logs[:, j] -= np.linalg.slogdet(covariance)[1] / 2
        likely = np.exp(logs)
        weights = [max(1e-6, p[y] / sum(p)) for p, y in zip(likely, labels, strict=True)]
    return logs


@pytest.mark.parametrize(("n", "fits"), [(40, 1), (40, 4), (120, 2)])
def test_log_likelihoods_are_a_literal_fit(monkeypatch, n, fits):
    monkeypatch.setattr(feature_detectors, "FITS", fits)
    labels, features, _, _ = gaussians(0.2, 1, n=n)
    expected = literal_densities(labels, principal(features), 3, fits)
    np.testing.assert_allclose(log_likelihoods(labels, features, 3), expected, rtol=1e-2, atol=1e-2)


def test_log_likelihoods_do_not_depend_on_where_and_how_large_features_are():
    """Turned, moved and scaled features have the same densities but for a constant."""
    labels, _, features, _, _ = overlapping(0.2, 0)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    moved = (features @ turn * 30 + 5).astype(np.float32)
    ours, expected = (log_likelihoods(labels, x, 5) for x in (moved, features))
    ours, expected = (x - x.mean(1, keepdims=True) for x in (ours, expected))
    np.testing.assert_allclose(ours, expected, atol=0.02)
    assert np.abs(expected).mean() > 1


def test_a_class_without_rows_is_never_likely():
    labels, _, features, _, _ = overlapping(0.2, 0)
    labels = np.where(labels == 1, 0, labels)
    logs = log_likelihoods(labels, features, 7)
    np.testing.assert_array_equal((logs == np.float32(NEVER)).all(0), [False, True, False, False, False, True, True])
    found = detect("density", labels, features=features)
    assert np.isfinite(found.score).all() and not np.isin(found.suggested, [1, 5, 6]).any()


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("constant", [False, True])
def test_fewer_rows_than_directions_and_constant_features_have_densities(n, constant):
    rng = np.random.default_rng(n)
    features = np.ones((n, 40)) if constant else rng.normal(size=(n, 40))
    assert np.isfinite(log_likelihoods(np.arange(n) % 2, features.astype(np.float32), 2)).all()


def test_density_flags_by_the_ratio():
    labels, _, features, _, _ = overlapping(0.2, 0)
    logs = log_likelihoods(labels, features, 5)
    for ratio in (2.0, 10.0):
        suspects = detect("density", labels, features=features, ratio=ratio)
        rivals = [max(row[c] for c in range(5) if c != y) for row, y in zip(logs, labels, strict=True)]
        score = logs[np.arange(len(labels)), labels] - rivals
        np.testing.assert_allclose(suspects.score, score, atol=1e-4)
        np.testing.assert_array_equal(suspects.flagged, score < -math.log(ratio))


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_density_finds_what_was_planted(rate):
    labels, features, true, expected = gaussians(rate, 7)
    found = metrics.detection(detect("density", labels, features=features), labels != true)
    oracle = expected.argmax(1) != labels  # who knows the densities
    hits = (oracle & (labels != true)).sum()
    assert found["f1"] > 2 * hits / (oracle.sum() + (labels != true).sum()) - 0.03


@pytest.mark.parametrize("size", [3, 40])
def test_principal_directions_are_those_of_a_singular_value_decomposition(size):
    features = np.random.default_rng(size).normal(size=(200, size)) * 0.8 ** np.arange(size) + 3
    u, s, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    kept = next(d for d in range(1, size + 1) if (s[:d] ** 2).sum() >= 0.95 * (s**2).sum())
    ours, peer = principal(features), u[:, :kept] * s[:kept]
    assert ours.shape == (200, kept)
    np.testing.assert_allclose(ours * np.sign((ours * peer).sum(0)), peer, atol=1e-6)


def test_no_more_principal_directions_than_the_most():
    features = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    assert principal(features).shape == (300, feature_detectors.MOST_DIRECTIONS)
    assert principal(features[:, :1] * 0).shape == (300, 1)
