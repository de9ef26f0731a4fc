"""Cleaning by rounds: planted labels, a slow literal loop, and estimates planned in advance that end it."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from expected import refused
from synthetic import planted

from ptglab.detect import cleaning, label_errors, noise_rate
from ptglab.detect.suspects import Suspects
from ptglab.train import finetune, losses, predict

K = 4
each_action = pytest.mark.parametrize("action", cleaning.ACTIONS)


def problem(blur: float = 0, seed: int = 1):
    """Return (labels_given, labels_true, features) of the planted problem, 40 % wrong; blurred, classes overlap."""
    given, true, _, features = planted(n=500, k=K, rate=0.4, seed=seed)
    rng = np.random.default_rng(seed)
    return given, true, features + blur * rng.normal(size=features.shape).astype(np.float32)


def judge(features):
    return lambda labels, trusted: predict.out_of_fold(features, labels, K, trusted=trusted)


# ---- on planted labels


@each_action
@pytest.mark.parametrize(("detector", "blur"), [("confidence", 0), ("ensemble", 2)])
def test_every_round_leaves_fewer_wrong_labels_than_the_first(action, detector, blur):
    given, true, features = problem(blur)
    before = given.copy()
    rounds = list(
        cleaning.clean(given, judge(features), partial(label_errors.detect, detector), action, features, max_rounds=4)
    )
    np.testing.assert_array_equal(given, before)
    first, *later = rounds
    np.testing.assert_array_equal(first.labels, given)
    assert first.trusted.all() and 1 <= len(later) <= 3
    estimated = [each.estimated for each in rounds]
    assert all(b < a for a, b in zip(estimated, estimated[1:], strict=False))
    wrong = [(each.labels != true)[each.trusted].mean() for each in rounds]
    assert all(share < wrong[0] for share in wrong[1:])
    if not blur:
        assert abs(estimated[0] - wrong[0]) < 0.02 and wrong[-1] < 0.01 and estimated[-1] < 0.02
    for each in rounds:
        if action == "drop":
            np.testing.assert_array_equal(each.labels, given)
        else:
            assert each.trusted.all()
    left = [each.trusted.sum() for each in rounds]
    assert all(b < a for a, b in zip(left, left[1:], strict=False)) == (action == "drop")


def slow_clean(given, fit, detect, action, features, max_rounds):
    """Yield (labels, trusted rows, estimated) as lists, one row at a time."""
    labels, left, before = given.tolist(), list(range(len(given))), float("inf")
    for _ in range(max_rounds):
        trusted = [row in left for row in range(len(given))]
        probs = fit(np.array(labels), np.array(trusted))
        own, inputs = np.array([labels[row] for row in left]), np.array([probs[row] for row in left])
        estimated = noise_rate.estimate(own, K, inputs).rate
        if not estimated < before:
            return
        yield list(labels), list(left), estimated
        found = detect(own, inputs, np.array([features[row] for row in left]))
        flagged = {row: int(new) for row, bad, new in zip(left, found.flagged, found.suggested, strict=True) if bad}
        if not flagged:
            return
        for row, new in flagged.items():
            if action == "drop":
                left.remove(row)
            else:
                labels[row] = new
        before = estimated


@each_action
@pytest.mark.parametrize(("detector", "rounds"), [("confidence", 3), ("knn", 2)])
def test_rounds_are_those_of_a_slow_literal_loop(action, detector, rounds):
    given, _, features = problem(blur=2, seed=3)
    detect = partial(label_errors.detect, detector)
    ours = list(cleaning.clean(given, judge(features), detect, action, features, max_rounds=5))
    slow = list(slow_clean(given, judge(features), detect, action, features, max_rounds=5))
    assert len(ours) == len(slow) >= rounds
    for each, (labels, left, estimated) in zip(ours, slow, strict=True):
        assert each.labels.tolist() == labels and np.flatnonzero(each.trusted).tolist() == left
        assert each.estimated == pytest.approx(estimated)
        np.testing.assert_array_equal(each.probs, judge(features)(each.labels, each.trusted))


# ---- when it ends; what is fitted, detected and estimated is planned


@pytest.fixture
def planned(monkeypatch):
    """Return a function (estimates, flagged rows of each round, ...) that runs `clean` on 6 rows of 3 classes.

    It returns (rounds, calls): `calls` holds what fit and detect were given. A flagged label becomes the next class.
    """

    def run(estimates, flagged, action="relabel", given=(0, 1, 2, 0, 1, 2), featured=True, **options):
        given, calls, estimates = np.array(given), SimpleNamespace(fit=[], detect=[]), iter(estimates)
        features = np.arange(12.0).reshape(6, 2) if featured else None
        probs = np.random.default_rng(0).dirichlet(np.ones(3), len(given))

        def fit(labels, trusted):
            calls.fit.append((labels.tolist(), np.flatnonzero(trusted).tolist()))
            return probs

        def detect(labels, own, its_features):
            rows = [int(np.flatnonzero((probs == row).all(1))[0]) for row in own]
            assert (its_features[:, 0] / 2).tolist() == rows if featured else its_features is None
            calls.detect.append((labels.tolist(), rows))
            bad = np.isin(rows, flagged[len(calls.detect) - 1])
            return Suspects(np.zeros(len(rows), np.float32), bad, (labels + 1) % 3)

        monkeypatch.setattr(noise_rate, "estimate", lambda *args, **kwargs: SimpleNamespace(rate=next(estimates)))
        rounds = list(cleaning.clean(given, fit, detect, action, features, **options))
        assert given.tolist() == list(calls.fit[0][0])
        return rounds, calls

    return run


@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("last", [0.2, 0.25], ids=["stays", "rises"])
def test_a_round_whose_estimate_does_not_fall_is_not_kept(planned, last, featured):
    rounds, calls = planned([0.4, 0.2, last, 0.1], [[1], [4], [5]], featured=featured)
    assert [each.estimated for each in rounds] == [0.4, 0.2]
    assert [each.labels.tolist() for each in rounds] == [[0, 1, 2, 0, 1, 2], [0, 2, 2, 0, 1, 2]]
    assert [labels for labels, _ in calls.fit] == [[0, 1, 2, 0, 1, 2], [0, 2, 2, 0, 1, 2], [0, 2, 2, 0, 2, 2]]


def test_dropped_rows_are_gone_for_good(planned):
    """Neither learned from nor judged again, but predicted all the same; row 4 is the third of those left."""
    rounds, calls = planned([0.4, 0.3, 0.2, 0.3], [[1, 2], [4], [3]], action="drop")
    assert [np.flatnonzero(each.trusted).tolist() for each in rounds] == [[0, 1, 2, 3, 4, 5], [0, 3, 4, 5], [0, 3, 5]]
    assert all(each.labels.tolist() == [0, 1, 2, 0, 1, 2] and each.probs.shape == (6, 3) for each in rounds)
    assert [rows for _, rows in calls.fit] == [[0, 1, 2, 3, 4, 5], [0, 3, 4, 5], [0, 3, 5], [0, 5]]
    assert [rows for _, rows in calls.detect] == [[0, 1, 2, 3, 4, 5], [0, 3, 4, 5], [0, 3, 5]]


@each_action
def test_where_nothing_is_flagged_or_enough_rounds_are_done_it_ends(planned, action):
    rounds, calls = planned([0.4, 0.3, 0.2], [[3], [], [4]], action)
    assert [each.estimated for each in rounds] == [0.4, 0.3]
    assert len(calls.fit) == len(calls.detect) == 2
    assert len(planned(np.linspace(0.5, 0, 9), [[0]] * 9, max_rounds=3)[0]) == 3
    assert len(planned(np.linspace(0.5, 0, 12), [[0]] * 12)[0]) == 10


@pytest.mark.parametrize(
    ("action", "given", "flagged"),
    [("drop", (0, 0, 1, 1, 0, 0), [2, 3]), ("drop", (0, 1, 2, 0, 1, 2), [0, 1, 2, 3, 4, 5]),
     ("relabel", (0, 0, 1, 1, 0, 0), [0, 1, 4, 5])],
)  # fmt: skip
def test_labels_of_one_class_are_not_learned_from(planned, action, given, flagged):
    rounds, calls = planned([0.4, 0.3], [flagged], action, given)
    assert len(rounds) == len(calls.fit) == 1 and rounds[0].labels.tolist() == list(given)


def test_an_unknown_action_is_refused_before_anything_is_learned():
    def run(action):
        next(cleaning.clean(np.array([0, 1]), None, None, action))

    refused("unknown action 'relabell'", "did you mean 'relabel'", call=run)("relabell")


# ---- the suspects that are left


def test_changed_rows_come_first_in_the_order_of_the_first_round():
    """By hand: 1 was relabelled, 4 and 5 dropped; 2 was flagged at first, and spared in the end."""
    first = Suspects(
        np.array([0.9, 0.3, 0.1, 0.5, 0.2, 0.7], np.float32), np.array([0, 1, 1, 0, 1, 0], bool), np.array([2] * 6)
    )
    given = np.array([0, 1, 0, 1, 0, 1])
    probs = np.array([[0.1, 0.2, 0.7]] * 5 + [[0.3, 0.6, 0.1]])  # of the last one, the given label is the likeliest
    last = cleaning.Round(np.array([0, 0, 0, 1, 0, 1]), np.array([1, 1, 1, 1, 0, 0], bool), probs, 0.1)
    found = cleaning.changes(first, given, last)
    assert found.flagged.tolist() == [False, True, False, False, True, True]
    assert np.argsort(found.score).tolist() == [4, 1, 5, 2, 3, 0]
    assert found.suggested.tolist() == [2, 0, 2, 2, 2, 0] and found.score.dtype == np.float32
    assert first.score.tolist() == pytest.approx([0.9, 0.3, 0.1, 0.5, 0.2, 0.7])


# ---- the table


def test_recipes_are_made_of_what_there_is():
    """And no two are the same. A plain one has the defaults of `finetune.train`, and nothing more."""
    assert cleaning.DETECTOR in label_errors.DETECTORS
    assert len(set(cleaning.RECIPES.values())) == len(cleaning.RECIPES)
    assert cleaning.RECIPES["plain"] == cleaning.Recipe()
    assert {recipe.loss for recipe in cleaning.RECIPES.values()} == losses.SUPERVISED.keys()
    assert {recipe.clean for recipe in cleaning.RECIPES.values()} == {"", *cleaning.ACTIONS}
    assert finetune.Options().loss == cleaning.Recipe().loss
