"""How likely each label is to be wrong, what is promised of the first ones, and when nothing is known."""

import math

import numpy as np
import pytest
from wrong_labels import blobs, overlapping

from ptglab.detect import calibration
from ptglab.detect.label_errors import detect
from ptglab.detect.suspects import Suspects


def drawn(transition: np.ndarray, sharpness: float, n: int = 6000, seed: int = 0):
    """Return (labels, true labels, z, probs): labels drawn by the model itself, and probs as sure as z^sharpness."""
    rng, k = np.random.default_rng(seed), len(transition)
    z = rng.dirichlet(np.full(k, 0.15), n)
    true = (rng.random((n, 1)) > z.cumsum(1)).sum(1).clip(max=k - 1)
    labels = (rng.random((n, 1)) > transition[true].cumsum(1)).sum(1).clip(max=k - 1)
    probs = z.clip(1e-9) ** sharpness
    return labels, true, z, probs / probs.sum(1, keepdims=True)


@pytest.mark.parametrize("sharpness", [0.5, 1, 2])
@pytest.mark.parametrize("kind", ["uniform", "one_way"])
def test_labels_drawn_by_the_model_get_their_true_probability(kind, sharpness):
    """Bayes' rule with the true transition matrix and the true z, where `probs` are too unsure, right, or too sure."""
    t = 0.7 * np.eye(4) + 0.075 if kind == "uniform" else np.eye(4)
    if kind == "one_way":
        t[1] = [0, 0.7, 0.3, 0]
    labels, true, z, probs = drawn(t, sharpness)
    rows = np.arange(len(labels))
    exact = np.array([1 - z[i, y] * t[y, y] / sum(z[i, j] * t[j, y] for j in range(4)) for i, y in enumerate(labels)])
    views, _ = calibration.views_of(labels, probs, None, None)
    probability = calibration.wrong(labels, views)
    found = probability(rows, labels)
    assert np.abs(found - exact).mean() < 0.02
    assert abs(found.mean() - (labels != true).mean()) < 0.02
    assert found.min() >= 0 and found.max() <= 1
    other = (labels + 1) % 4  # labels that nobody gave
    assert probability(rows, other).mean() > found.mean() + 0.1


@pytest.mark.parametrize("inputs", ["probs", "features", "both"])
@pytest.mark.parametrize("rate", [0.02, 0.2, 0.4])
def test_the_sum_of_the_probabilities_counts_the_wrong_labels(rate, inputs):
    labels, probs, features, _, true = blobs(rate, 0)
    used = {"probs": None if inputs == "features" else probs, "features": None if inputs == "probs" else features}
    views, _ = calibration.views_of(labels, **used, neighbours=None)
    found = calibration.wrong(labels, views)(np.arange(len(labels)), labels)
    assert abs(found.mean() - (labels != true).mean()) < 0.03


def test_the_posterior_follows_the_ranking():
    """It never rises with the score, keeps the sum of the probabilities, and is the same whatever the scores' scale."""
    labels, probs, features, _, _ = overlapping(0.2, 0)
    found = detect("ensemble", labels, probs, features)
    p = calibration.posterior(found, labels, probs, features)
    views, _ = calibration.views_of(labels, probs, features, None)
    raw = calibration.wrong(labels, views)(np.arange(len(labels)), labels)
    assert p.dtype == np.float32 and p.shape == labels.shape
    assert (np.diff(p[np.argsort(found.score, kind="stable")]) <= 0).all()
    assert p.mean() == pytest.approx(raw.mean(), abs=1e-5)
    scaled = Suspects(3 * found.score + 1, found.flagged, found.suggested)
    np.testing.assert_allclose(calibration.posterior(scaled, labels, probs, features), p, atol=1e-4)


@pytest.mark.parametrize("n", [30, 100, 300])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
def test_the_first_hold_what_is_promised(rate, n):
    for seed in range(2):
        labels, probs, features, _, true = overlapping(rate, seed)
        found = detect("ensemble", labels, probs, features)
        expected, low, high = calibration.first(calibration.posterior(found, labels, probs, features), n)
        realised = (labels != true)[np.argsort(found.score, kind="stable")[:n]].mean()
        assert 0 <= low <= expected <= high <= 1
        assert low <= realised <= high and high - low < 0.6


def test_the_promise_by_hand():
    """The mean of the likeliest; the ends with all odds times or by one factor, and chance beyond that."""
    p = np.array([0.9, 0.2, 0.6, 0.1, 0.3])
    reach = 1.96 * math.hypot(calibration.ODDS, 1 / math.sqrt(2.1))

    def end(sign: int) -> float:
        odds = [q / (1 - q) * math.exp(sign * reach) for q in (0.9, 0.6, 0.3)]
        moved = [o / (1 + o) for o in odds]
        return sum(moved) / 3 + sign * 1.96 * math.sqrt(sum(q * (1 - q) for q in moved)) / 3

    assert calibration.first(p, 3) == pytest.approx((0.6, max(0, end(-1)), min(1, end(1))))
    many = np.full(4000, 0.5)
    expected, low, high = calibration.first(many, 4000)
    assert expected == 0.5 and high - expected == pytest.approx(expected - low)
    assert high - low < np.subtract(*calibration.first(many, 20)[:0:-1])  # more labels, less chance
    for sure in (0, 1):
        assert calibration.first(np.full(50, float(sure)), 20) == pytest.approx((sure, sure, sure), abs=0.02)


@pytest.mark.parametrize("precision", [0.3, 0.5, 0.7, 0.9, 1])
def test_flags_keep_the_expected_precision(precision):
    """As many of the first as have that mean; one more would not keep it."""
    rng = np.random.default_rng(0)
    p, labels, belief = rng.random(200) ** 2, rng.integers(0, 3, 200), rng.dirichlet(np.ones(3), 200)
    found = Suspects((1 - p).astype(np.float32), np.zeros(200, bool), labels)
    flagged = calibration.flag_by_precision(found, p, precision, labels, belief)
    order, most = sorted(range(200), key=lambda i: -p[i]), 0
    for count in range(1, 201):
        if sum(p[i] for i in order[:count]) >= precision * count:
            most = count
    assert set(np.flatnonzero(flagged.flagged)) == set(order[:most])
    assert (flagged.suggested[flagged.flagged] != labels[flagged.flagged]).all()


def test_flags_by_precision_on_planted_labels():
    for rate in (0.1, 0.2, 0.4):
        labels, probs, features, _, true = overlapping(rate, 0)
        found = detect("ensemble", labels, probs, features)
        p, counts = calibration.posterior(found, labels, probs, features), []
        for precision in (0.5, 0.7, 0.9):
            flagged = calibration.flag_by_precision(found, p, precision, labels, probs).flagged
            assert abs((labels != true)[flagged].mean() - precision) < 0.1
            counts.append(flagged.sum())
        assert counts[0] > counts[1] > counts[2] > 0


@pytest.mark.parametrize("rate", [0, 0.2, 0.6])
def test_what_tells_classes_apart_knows_something(rate):
    labels, probs, features, _, _ = blobs(rate, 0)
    assert calibration.knowledge(labels, probs, features) == ""
    assert rate > 0.5 or calibration.knowledge(labels[:30], probs[:30]) == ""


def test_nothing_is_known_by_chance():
    """Shuffled labels, the largest class always, equal rows and classes of 2: each sentence names its reason."""
    labels, probs, features, _, _ = blobs(0.2, 0)
    rng = np.random.default_rng(0)
    assert "by chance" in calibration.knowledge(rng.permutation(labels), probs)
    skewed, always = (rng.random(500) < 0.1).astype(np.int64), np.tile([0.9, 0.1], (500, 1))
    assert "by chance" in calibration.knowledge(skewed, always)
    assert "the same" in calibration.knowledge(labels, probs, np.ones_like(features))
    assert "2 images" in calibration.knowledge(np.arange(20) // 2, np.eye(10)[np.arange(20) // 2])
    false_alarms = [not calibration.knowledge(rng.permutation(labels)[:60], probs[:60]) for _ in range(100)]
    assert sum(false_alarms) <= 3  # of knowledge where there is none
