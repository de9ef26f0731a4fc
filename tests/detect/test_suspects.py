"""What every detector takes and returns."""

import numpy as np
import pytest
from expected import refused

from ptglab.detect.suspects import Suspects, check, check_classes, flag, suspects


def random_belief(seed: int, n: int = 200, k: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (labels, belief [N, K], score, flagged): two labels in three are the likeliest class."""
    rng = np.random.default_rng(seed)
    belief = rng.normal(size=(n, k))
    labels = np.where(rng.random(n) < 2 / 3, belief.argmax(1), rng.integers(0, k, n))
    return labels, belief, rng.normal(size=n), rng.random(n) < 0.4


@pytest.mark.parametrize("known", [False, True])
def test_the_suggestion_is_the_best_class_and_for_a_flagged_label_the_best_other(known):
    labels, belief, score, flagged = random_belief(0)
    before, best = belief.copy(), belief.argmax(1)
    found = suspects(labels, belief, score, flagged, best if known else None)
    for label, row, is_flagged, suggested in zip(labels, belief, flagged, found.suggested, strict=True):
        choices = [j for j in range(5) if not (is_flagged and j == label)]
        assert suggested == max(choices, key=lambda j, row=row: row[j])
    assert (found.suggested != best).any()
    np.testing.assert_array_equal(best, belief.argmax(1))
    np.testing.assert_array_equal(belief, before)
    assert found.score.dtype == np.float32 and found.suggested.dtype == np.int64
    np.testing.assert_array_equal(found.score, score.astype(np.float32))
    np.testing.assert_array_equal(found.flagged, flagged)


@pytest.mark.parametrize("count", [0, 1, 199, 200, np.int64(5), 12.0])
def test_flag_flags_that_many_of_the_lowest_score(count):
    found = suspects(*random_belief(0))
    before, anew = found.flagged.copy(), flag(found, count)
    assert anew.flagged.dtype == bool and anew.flagged.sum() == count
    assert max(anew.score[anew.flagged], default=-np.inf) <= min(anew.score[~anew.flagged], default=np.inf)
    np.testing.assert_array_equal(anew.score, found.score)
    np.testing.assert_array_equal(anew.suggested, found.suggested)
    np.testing.assert_array_equal(found.flagged, before)


@pytest.mark.parametrize("n", [20, 5000])
def test_flag_takes_the_first_rows_of_equals(n):
    """Nine tenths tie at the lowest score: NumPy's default sort would mix them from 17 rows on."""
    score = np.where(np.arange(n) % 10, 0.25, 0.5).astype(np.float32)
    found = Suspects(score, np.zeros(n, bool), np.zeros(n, int))
    assert list(np.flatnonzero(flag(found, n // 3).flagged)) == [i for i in range(n) if i % 10][: n // 3]


def test_flag_suggests_anew_from_labels_and_belief():
    """Rows 0 and 1 are flagged; row 0's label is the best class, so that the second best is suggested."""
    labels, belief = np.array([2, 1, 0]), np.array([[0.1, 0.3, 0.6], [0.5, 0.4, 0.1], [0.9, 0.1, 0.0]])
    found = suspects(labels, belief, np.array([0.1, 0.2, 0.3]), np.zeros(3, bool))
    assert list(found.suggested) == [2, 0, 0]
    assert list(flag(found, 2, labels, belief).suggested) == [1, 0, 0]
    assert list(flag(found, 3, list(labels), belief).suggested) == [1, 0, 1]
    assert list(flag(found, 2, labels).suggested) == list(flag(found, 2, None, belief).suggested) == [2, 0, 0]
    once_more = flag(flag(found, 3, labels, belief), 0, labels, belief)
    assert list(once_more.suggested) == [2, 0, 0] and not once_more.flagged.any()


@pytest.mark.parametrize("count", [-1, 4, 1.5, np.nan, np.inf])
def test_flag_refuses_counts_that_are_none(count):
    found = Suspects(np.zeros(3, np.float32), np.zeros(3, bool), np.zeros(3, int))
    refused(f"{count}", "from 0 to 3", call=flag)(found, count)


ROWS = np.zeros(12, int)


@pytest.mark.parametrize(
    ("labels", "arrays", "message"),
    [
        (np.zeros(12), {}, "labels are float64 of shape (12,)"),
        (np.zeros(12, bool), {}, "labels are bool"),
        (np.zeros(12, str), {}, "labels are <U1"),
        (np.eye(12, dtype=int), {}, "shape (12, 12)"),
        (np.array(3), {}, "shape ()"),
        (ROWS, {"probs": np.zeros((11, 3))}, "probs has 11 rows for 12 labels"),
        (ROWS, {"features": np.zeros(12)}, "features is empty or not of two dimensions: its shape is (12,)"),
        (ROWS, {"history": np.zeros((12, 4))}, "history has 4 rows for 12 labels"),
        (ROWS, {"history": np.zeros((0, 12))}, "history is empty"),
        (ROWS, {"features": np.zeros((12, 0))}, "features is empty"),
        (ROWS, {"features": np.full((12, 2), np.nan)}, "features holds values that are not finite"),
        (ROWS, {"history": np.full((2, 12), -np.inf)}, "history holds values that are not finite"),
        (ROWS, {"probs": np.zeros((12, 3)), "features": np.zeros((13, 3))}, "features has 13 rows for 12 labels"),
        (ROWS, {"neighbours": [np.zeros((5, 2))] * 2}, "neighbours has 5 rows for 12 labels"),
    ],
)
def test_check_names_what_does_not_fit(labels, arrays, message):
    refused(message, call=check)(labels, **arrays)


def test_check_lets_pass_what_fits():
    """Small and unsigned labels too; probabilities are looked through where they are read."""
    for dtype in (np.int64, np.int16, np.uint8):
        probs = np.full((12, 3), np.nan)
        check(ROWS.astype(dtype), probs=probs, features=np.zeros((12, 1)), history=np.zeros((1, 12)))
    check(ROWS[:0], probs=np.zeros((0, 3)))
    check_classes(np.array([0, 2]), 3)
    check_classes(np.array([5, 9]))


@pytest.mark.parametrize(
    ("labels", "k", "words"), [([-1, 1], None, "from -1 to 1"), ([0, 3], 3, "from 0 to 3"), ([0, 0], 1, "1 classes")]
)
def test_check_classes_names_the_labels(labels, k, words):
    refused(words, call=check_classes)(np.array(labels), k)
