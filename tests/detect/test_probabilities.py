"""What confident learning reads from probabilities, against cleanlab and loops."""

import warnings

import numpy as np
import pytest
from expected import refused
from wrong_labels import both_types, random_problem

from ptglab.detect import probabilities

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cleanlab.count import compute_confident_joint, get_confident_thresholds
    from cleanlab.filter import _keep_at_least_n_per_class
    from cleanlab.internal.util import round_preserving_row_totals


def thresholds_of(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    return probabilities.class_thresholds(labels, probs[np.arange(len(labels)), labels], probs.shape[1])


def confident_classes(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    return probabilities.confident_classes(probs, thresholds_of(labels, probs), probabilities.read(labels, probs))


@both_types
@pytest.mark.parametrize("elements", [1, 100, 1 << 18])
@pytest.mark.parametrize("seed", range(4))
def test_read_margin_and_confident_class_by_hand(monkeypatch, seed, dtype, elements):
    """The confident class is that of the for-loop in the docstring of cleanlab's `compute_confident_joint`."""
    monkeypatch.setattr(probabilities, "BLOCK_ELEMENTS", elements)
    labels, probs = random_problem(seed, dtype)
    rows, thresholds = probabilities.read(labels, probs), get_confident_thresholds(labels, probs)
    margin, confident = probabilities.margin(labels, probs, rows), confident_classes(labels, probs)
    for i, (label, row) in enumerate(zip(labels, probs, strict=True)):
        assert rows.own[i] == row[label] and rows.largest[i] == max(row)
        assert rows.best[i] == list(row).index(max(row))
        assert margin[i] == row[label] - max(p for j, p in enumerate(row) if j != label)
        reached = row >= thresholds - 1e-6
        expected = -1 if not reached.any() else np.argmax(reached) if reached.sum() == 1 else np.argmax(row)
        assert confident[i] == expected
    assert {array.dtype for array in (rows.own, rows.largest, margin)} == {np.dtype(dtype)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (17, 5), (29, 5)])
def test_what_is_not_finite_is_refused_wherever_it_stands(row, column, value):
    """In the given class of the row, or in a class that nobody is labelled as."""
    probs = np.full((30, 6), 1 / 6, np.float32)
    probs[row, column] = value
    refused("probs holds values that are not finite", call=probabilities.read)(np.arange(30) % 5, probs)


@pytest.mark.parametrize("seed", range(8))
def test_class_thresholds_are_cleanlabs(seed):
    """A class that nobody is labelled as is out of reach: infinite here, 2 there."""
    labels, probs = random_problem(seed)
    ours, peer = thresholds_of(labels, probs), get_confident_thresholds(labels, probs)
    missing = np.bincount(labels, minlength=probs.shape[1]) == 0
    assert missing.any() == (seed % 4 == 0 and probs.shape[1] > 2)
    np.testing.assert_array_equal(np.isinf(ours), missing)
    np.testing.assert_allclose(ours[~missing], peer[~missing], rtol=1e-6)


@both_types
@pytest.mark.parametrize("seed", range(12))
def test_the_joint_and_the_removals_are_cleanlabs(seed, dtype):
    """Cleanlab rounds the joint to whole numbers, ours is exact: rounded its way they are the same."""
    labels, probs = random_problem(seed, dtype)
    joint = probabilities.joint(labels, probs)
    peer = compute_confident_joint(labels, probs, calibrate=True)
    np.testing.assert_array_equal(round_preserving_row_totals(joint), peer)
    np.testing.assert_allclose(joint.sum(1), np.bincount(labels, minlength=probs.shape[1]), atol=1e-6)
    assert joint.dtype == np.float64
    removals = probabilities.removals(labels, probs, probabilities.read(labels, probs))
    np.testing.assert_array_equal(removals, _keep_at_least_n_per_class(peer.T, n=1).T)
    assert removals.diagonal().min() >= 1


@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_counts_twice_is_a_row_that_is_there_twice(seed):
    labels, probs = random_problem(seed)
    times = np.random.default_rng(seed).integers(0, 4, len(labels))
    times[labels == labels[0]] = 0  # a class that is not drawn
    probs[:, labels[1]] = 0  # a class that is never believed
    repeated = probabilities.joint(labels.repeat(times), probs.repeat(times, 0))
    np.testing.assert_allclose(probabilities.joint(labels, probs, weights=times), repeated, atol=1e-6)
