"""The estimated share of wrong labels: against what was planted, a literal reference and a closed form."""

import math

import numpy as np
import pytest
from expected import refused
from wrong_labels import blobs, random_problem

from ptglab.detect import neighbours, noise_rate, probabilities

every_method = pytest.mark.parametrize("method", noise_rate.METHODS)


@every_method
@pytest.mark.parametrize(("asymmetric", "rate"), [(False, 0.0), (False, 0.05), (False, 0.4), (True, 0.05), (True, 0.3)])
def test_what_was_planted_is_recovered(method, asymmetric, rate):
    labels, probs, features, _, true = blobs(rate, 0, asymmetric=asymmetric, n=3000)
    found = noise_rate.estimate(labels, 5, probs, features, method, bootstrap=5)
    assert abs(found.rate - (labels != true).mean()) < 0.02 and 0 <= found.low <= found.rate <= found.high < 1
    planted = np.array([[(labels[true == i] == j).mean() for j in range(5)] for i in range(5)])
    assert found.transition.dtype == np.float64
    np.testing.assert_allclose(found.transition.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(found.transition, planted, atol=0.05)


@every_method
def test_the_interval_covers_the_planted_rate(method):
    """In at least 16 of 20 draws of 1,000 rows, and it is half to twice as wide as drawing the rows makes it."""
    rows, covered = 1.96 * math.sqrt(0.3 * 0.7 / 1000), 0
    for seed in range(20):
        labels, probs, features, _, _ = blobs(0.3, seed)
        found = noise_rate.estimate(labels, 5, probs, features, method, bootstrap=30, seed=seed)
        assert found.low < found.rate < found.high
        assert rows / 2 < (found.high - found.low) / 2 < 2 * rows
        covered += found.low <= 0.3 <= found.high
    assert covered >= 16


def test_the_interval_is_that_of_rows_drawn_anew():
    labels, probs, _, _, _ = blobs(0.3, 0)
    labels, probs = labels[:150], probs[:150]
    found = noise_rate.estimate(labels, 5, probs, bootstrap=12, seed=4)
    rng, rates = np.random.default_rng(4), []
    for times in [np.ones(150, int), *(rng.multinomial(150, np.full(150, 1 / 150)) for _ in range(12))]:
        joint = probabilities.joint(labels.repeat(times), probs.repeat(times, 0))
        rates.append(1 - joint.trace() / joint.sum())
    rate, reach = rates[0], 1.96 * np.std(rates[1:], ddof=1)
    np.testing.assert_allclose([found.rate, found.low, found.high], [rate, rate - reach, rate + reach], atol=1e-5)


@every_method
def test_the_estimate_draws_from_its_seed_alone(method):
    """And leaves its inputs, which are read-only, as they are."""
    labels, probs, features, _, _ = blobs(0.3, 1)
    first, again, other = (
        noise_rate.estimate(labels, 5, probs, features, method, bootstrap=5, seed=seed) for seed in (1, 1, 2)
    )
    assert (first.rate, first.low, first.high) == (again.rate, again.low, again.high)
    assert first.rate == other.rate and first.low != other.low


def test_the_joint_method_is_the_confident_joint():
    labels, probs = random_problem(4)
    probs[:, probs.shape[1] // 2] = 0  # the class that nobody is labelled as
    found, joint = noise_rate.estimate(labels, probs.shape[1], probs, bootstrap=2), probabilities.joint(labels, probs)
    assert found.rate == pytest.approx(1 - joint.trace() / joint.sum())
    empty = joint.sum(0) == 0
    assert empty.sum() == 1
    np.testing.assert_allclose(found.transition[~empty], (joint / joint.sum(0).clip(1e-9)).T[~empty])
    np.testing.assert_array_equal(found.transition[empty], np.eye(len(joint))[empty])


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_consensus_climbs_by_literal_steps(monkeypatch, seed, steps):
    """How likely each row is of each class, and which labels such rows have; any labels and neighbours will do."""
    rng = np.random.default_rng(seed)
    n, k = 200, seed + 2
    labels, index = rng.integers(0, k, n) * rng.integers(0, 2, n), rng.integers(0, n, (n, 2))
    expected = (0.6 * np.eye(k) + 0.4 / k) * np.bincount(labels, minlength=k) / n
    for _ in range(steps):
        joint, expected = expected, np.zeros((k, k))
        prior = joint.sum(0)
        for i, pair in enumerate(index):
            triple = [labels[i], labels[pair[0]], labels[pair[1]]]
            likely = [prior[t] * math.prod(joint[y, t] / prior[t] for y in triple) for t in range(k)]
            for y in triple:
                expected[y] += np.array(likely) / sum(likely) / (3 * n)
    monkeypatch.setattr(noise_rate, "MAX_STEPS", steps)
    found = noise_rate.consensus(labels, index, k)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert abs(found - noise_rate.consensus(labels, index[:, [1, 0]], k)).max() < 1e-12


def test_a_class_that_nobody_is_labelled_as_is_left_out_of_the_consensus():
    rng = np.random.default_rng(0)
    labels, index = rng.integers(0, 3, 300), rng.integers(0, 300, (300, 2))
    expected = np.zeros((5, 5))
    expected[np.ix_([0, 2, 3], [0, 2, 3])] = noise_rate.consensus(labels, index, 3)
    np.testing.assert_allclose(noise_rate.consensus(np.array([0, 2, 3])[labels], index, 5), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_two_classes_have_a_closed_form(seed):
    """Of three labels of one unknown class the moments give the shares of label 1: the roots of a quadratic.

    m1, m2, m3: how often one, two, three labels are 1. With shares p and q in the two true classes,
    m2 = (p + q) m1 - p q and m3 = (p + q) m2 - p q m1.
    """
    rng = np.random.default_rng(seed)
    n, share, wrong = 4000, rng.uniform(0.3, 0.7), rng.uniform(0.05, 0.3, 2)
    true = (rng.random(n) < share).astype(int)
    labels = np.where(rng.random(n) < wrong[true], 1 - true, true)
    index = np.stack([rng.choice(np.flatnonzero(true == c), 2) for c in true])
    y = np.column_stack([labels, labels[index]])
    m1, m3 = y.mean(), y.prod(1).mean()
    m2 = np.mean([(y[:, a] * y[:, b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    total = (m3 - m1 * m2) / (m2 - m1**2)
    p, q = sorted(np.roots([1, -total, total * m1 - m2]))
    prior = (m1 - p) / (q - p)
    expected = [[(1 - prior) * (1 - p), prior * (1 - q)], [(1 - prior) * p, prior * q]]
    found = noise_rate.consensus(labels, index, 2)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert abs(noise_rate.wrong_share(found) - (labels != true).mean()) < 0.04


def test_the_clusterability_method_is_the_consensus_of_the_two_nearest(monkeypatch):
    """Which may have been found before: then nothing is searched, and no features are needed."""
    labels, _, features, _, _ = blobs(0.2, 2)
    nearest = neighbours.nearest(features, 6)
    joint = noise_rate.consensus(labels, nearest[1][:, :2], 5)
    found = noise_rate.estimate(labels, 5, features=features, method="clusterability", bootstrap=5)
    assert found.rate == pytest.approx(1 - joint.trace())
    np.testing.assert_allclose(found.transition, (joint / joint.sum(0)).T)
    monkeypatch.setattr(neighbours, "nearest", None)
    again = noise_rate.estimate(labels, 5, method="clusterability", bootstrap=5, neighbours=nearest)
    assert (found.rate, found.low, found.high) == (again.rate, again.low, again.high)


LABELS, PROBS = np.arange(12) % 3, np.full((12, 3), 1 / 3)
FEATURES = np.random.default_rng(0).normal(size=(12, 4))
IN_FEATURES = {"features": FEATURES, "method": "clusterability"}


@pytest.mark.parametrize(
    ("labels", "num_classes", "options", "words"),
    [
        (LABELS, 3, {"method": "joined"}, ["unknown method 'joined'", "did you mean 'joint'"]),
        (LABELS, 3, {}, ["method 'joint' needs probs"]),
        (LABELS, 3, {"probs": PROBS, "method": "clusterability"}, ["method 'clusterability' needs features"]),
        (LABELS, 3, {"probs": PROBS, "bootstrap": 1}, ["bootstrap is 1"]),
        (LABELS, 3, {"probs": PROBS[:5]}, ["probs has 5 rows for 12 labels"]),
        (LABELS, 4, {"probs": PROBS}, ["probs has 3 columns for 4 classes"]),
        (LABELS, 3, {"probs": PROBS * np.nan}, ["probs holds values that are not finite"]),
        (LABELS, 3, IN_FEATURES | {"features": FEATURES * np.inf}, ["features holds values that are not finite"]),
        (LABELS, 3, IN_FEATURES | {"neighbours": np.zeros((2, 9, 2), int)}, ["neighbours has 9 rows for 12 labels"]),
        (LABELS, 3, IN_FEATURES | {"neighbours": (np.zeros((12, 3)), np.zeros((12, 2), int))}, ["(12, 3)", "(12, 2)"]),
        (LABELS * 0 + 2, 3, {"probs": PROBS}, ["1 classes"]),
        (LABELS[:0], 3, {"probs": PROBS[:0]}, ["0 labels"]),
        (LABELS + 1, 3, {"probs": PROBS}, ["labels run from 1 to 3"]),
        (LABELS - 1, 3, IN_FEATURES, ["labels run from -1 to 1"]),
        (LABELS, 2, IN_FEATURES, ["labels run from 0 to 2", "2 classes"]),
        (LABELS / 1, 3, {"probs": PROBS}, ["labels are float64"]),
        (LABELS[:2], 3, IN_FEATURES | {"features": FEATURES[:2]}, ["2 labels", "draws of 3"]),
    ],
)
def test_wrong_input_is_named(labels, num_classes, options, words):
    refused(*words, call=noise_rate.estimate)(labels, num_classes, **options)


@every_method
def test_three_rows_will_do(method):
    found = noise_rate.estimate(LABELS[:3], 3, PROBS[:3], FEATURES[:3], method)
    assert 0 <= found.low <= found.rate <= found.high <= 1


def test_the_interval_ends_at_one():
    """Six rows at random positions, of which hardly anything is known."""
    rng = np.random.default_rng(0)
    labels, features = np.append([0, 1], rng.integers(0, 2, 4)), rng.normal(size=(6, 3))
    found = noise_rate.estimate(labels, 2, features=features, method="clusterability")
    assert found.rate > 0.5 and found.high == 1


@pytest.mark.parametrize("rate", [0, 0.01, 0.2, 0.5, 1])
def test_the_interval_of_several_methods(rate):
    """It holds the rate; the further the methods are apart and the fewer the labels, the wider it is."""

    def width(n: int, *others: float) -> float:
        estimates = [noise_rate.NoiseRate(other, 0, 1, np.eye(2)) for other in others]
        low, high = noise_rate.interval(rate, estimates, n)
        assert 0 <= low <= rate <= high <= 1
        return high - low

    assert width(5000, rate, rate) < width(200, rate, rate) < 0.3
    assert width(5000, rate, rate) < width(5000, rate, 0.6) < width(5000, 0.7, 0.7)


def test_the_interval_of_several_methods_by_hand():
    estimates = [noise_rate.NoiseRate(other, 0, 1, np.eye(2)) for other in (0.2, 0.4)]
    logs = [math.log(p / (1 - p)) for p in (0.1, 0.2, 0.4)]
    reach = math.hypot(noise_rate.DISTRUST * (logs[1] + logs[2] - 2 * logs[0]) / 2, 1.96 / math.sqrt(100))
    ends = [1 / (1 + math.exp(-logs[0] - sign * reach)) for sign in (-1, 1)]
    expected = (ends[0] - noise_rate.HARD, ends[1])
    assert noise_rate.interval(0.1, estimates, 1000) == pytest.approx(expected)
