"""Detectors that learn from labels made wrong on purpose."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from wrong_labels import blobs, overlapping, random_problem

from ptglab.detect import calibration, noise_rate, probabilities
from ptglab.detect.auxiliary import plant
from ptglab.detect.label_errors import detect, usable
from ptglab.lab import metrics

learners = pytest.mark.parametrize("name", ["auxiliary", "ensemble"])
MEMBERS = ["confidence", "disagreement", "knn", "simifeat", "density"]


@functools.cache
def quality(name: str, rate: float) -> pd.Series:
    """Return the mean over four seeds of how well `name` finds what was planted where classes overlap."""
    found = []
    for seed in range(4):
        labels, probs, features, _, true = overlapping(rate, seed)
        suspects = detect(name, labels, probs=probs, features=features, seed=seed)
        found.append(metrics.detection(suspects, labels != true))
    return pd.DataFrame(found).mean()


@pytest.mark.parametrize(("rate", "floor"), [(0.05, 0.93), (0.2, 0.95), (0.4, 0.97)])
def test_auxiliary_finds_what_was_planted(rate, floor):
    """Classes well apart; the least F1 of four seeds when this was written was .943, .967 and .983."""
    for seed in range(2):
        labels, probs, features, _, true = blobs(rate, seed)
        suspects = detect("auxiliary", labels, probs=probs, features=features, seed=seed)
        assert metrics.detection(suspects, labels != true)["f1"] >= floor
    score = suspects.score  # many are wrong with probability 1 by the network's odds; they are still ranked
    assert len(np.unique(score[score < 0.001])) > 0.9 * (score < 0.001).sum()


@pytest.mark.parametrize(("rate", "floor"), [(0.05, 0.6), (0.2, 0.8), (0.4, 0.85)])
def test_learners_beat_the_others_where_classes_overlap(rate, floor):
    """Mean F1 over four seeds when this was written: .668, .843 and .873; at .05 confidence was better, .78."""
    reached = quality("auxiliary", rate)["f1"]
    assert reached >= floor
    for name in ["confidence"] * (rate > 0.05) + ["disagreement", "confident_learning", "knn"]:
        assert reached > quality(name, rate)["f1"]
    middle = pd.DataFrame([quality(name, rate) for name in MEMBERS]).median()
    ours = quality("ensemble", rate)
    assert ours["f1"] >= middle["f1"] and ours["average_precision"] >= middle["average_precision"]


def ranks(score) -> np.ndarray:
    """Return the share of values below each, and half of those equal to it."""
    score = np.array(score)
    return np.array([(score < t).sum() + (score == t).sum() / 2 for t in score]) / len(score)


@pytest.mark.parametrize("useless", ["probs", "features"])
def test_members_that_know_nothing_have_little_say(useless):
    """Noise in the place of an input: the ensemble finds about what it finds without it, and equal weights less."""
    for seed in range(2):
        labels, probs, features, _, true = overlapping(0.2, seed)
        rng, inputs = np.random.default_rng(seed), {"probs": probs, "features": features}
        noise = {
            "probs": rng.dirichlet(np.ones(5), len(labels)).astype(np.float32),
            "features": rng.normal(size=features.shape).astype(np.float32),
        }
        spoilt = inputs | {useless: noise[useless]}
        del inputs[useless]
        without, with_noise = (detect("ensemble", labels, **given).score for given in (inputs, spoilt))
        equal = np.mean([ranks(detect(name, labels, **spoilt).score) for name in MEMBERS], 0)
        found = [average_precision_score(labels != true, -score) for score in (with_noise, without, equal)]
        assert found[0] > found[1] - 0.05
        assert found[0] > found[2] + 0.05


def test_the_ensemble_by_hand():
    """Of two members: labels planted among rows of high mean rank tell what each is worth; a third is the model's."""
    labels, probs, _, _, _ = overlapping(0.3, 0)
    labels, probs = labels[:200], probs[:200]

    def margin(p: np.ndarray, y: int) -> float:
        return float(p[y]) - max(float(p[c]) for c in range(5) if c != y)

    judges = [lambda p, y: float(p[y]), margin]
    member_ranks = [ranks([judge(p, y) for p, y in zip(probs, labels, strict=True)]) for judge in judges]
    joint = probabilities.joint(labels, probs)
    wrong = 1 - joint.trace() / joint.sum()
    mean = sum(member_ranks)
    clean = sorted(range(200), key=lambda i: -mean[i])[: round((1 - wrong) * 200)]
    rows, flips = plant(labels[clean], labels[clean], joint, np.random.default_rng([9, 1]))
    score, total = np.zeros(200), 0
    for rank, judge in zip(member_ranks, judges, strict=True):
        given = [judge(probs[i], labels[i]) for i in clean]
        made = [judge(probs[clean[row]], flip) for row, flip in zip(rows, flips, strict=True)]
        area = np.mean([(m < g) + (m == g) / 2 for m in made for g in given])
        weight = max(0, area - 0.5) / (1 - area + 1e-2)
        score, total = score + weight * rank, total + weight
    suspects = detect("ensemble", labels, probs=probs, seed=9)
    likely = calibration.wrong(labels, calibration.views_of(labels, probs, None, None)[0])(np.arange(200), labels)
    np.testing.assert_allclose(suspects.score, (2 * score / total + ranks(-likely)) / 3, atol=1e-5)
    assert suspects.flagged.sum() == round(likely.mean() ** (2 / 3) * wrong ** (1 / 3) * 200)
    assert suspects.score[suspects.flagged].max() <= suspects.score[~suspects.flagged].min()


@pytest.mark.parametrize("useless", ["", "probs", "features"])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_the_ensemble_flags_as_many_as_two_estimates_meet_at(rate, useless):
    """Seven parts what the model says and one what the joint says, as a geometric mean; lowest scores first.

    Of two joints the one with fewer wrong labels is believed: a poor input counts its own faults as wrong labels too.
    """
    labels, probs, features, _, _ = overlapping(rate, 2)
    rng = np.random.default_rng(0)
    if useless == "probs":
        probs = np.full_like(probs, 0.2) + rng.uniform(0, 0.01, probs.shape).astype(np.float32)
    if useless == "features":
        features = rng.normal(size=features.shape).astype(np.float32)
    ours = detect("ensemble", labels, probs=probs, features=features, seed=5)
    views, _ = calibration.views_of(labels, probs, features, None)
    likely = calibration.wrong(labels, views)(np.arange(len(labels)), labels).mean()
    wrong = {m: noise_rate.estimate(labels, 5, probs, features, m, bootstrap=2).rate for m in noise_rate.METHODS}
    assert useless != "features" or wrong["joint"] < wrong["clusterability"]
    assert useless != "probs" or wrong["joint"] > wrong["clusterability"]
    assert ours.flagged.sum() == round(likely ** (2 / 3) * min(wrong.values()) ** (1 / 3) * len(labels))
    assert ours.score[ours.flagged].max() <= ours.score[~ours.flagged].min()


def test_the_ensemble_without_probabilities_counts_by_the_consensus():
    labels, _, features, _, true = blobs(0.3, 0)
    suspects = detect("ensemble", labels, features=features)
    assert abs(suspects.flagged.mean() - (labels != true).mean()) < 0.03
    assert metrics.detection(suspects, labels != true)["f1"] > 0.95


@learners
def test_learners_draw_from_their_seed_alone(name):
    """And leave the global state alone."""
    labels, probs, features, _, _ = overlapping(0.2, 0)

    def score(seed: int, elsewhere: int) -> tuple:
        np.random.seed(elsewhere)  # noqa: NPY002
        torch.manual_seed(elsewhere)
        found = detect(name, labels, probs=probs, features=features, seed=seed).score
        return found, np.random.random(), torch.rand(1).item()  # noqa: NPY002

    (first, *_), (second, *left), (other, *same) = score(3, 0), score(3, 1), score(4, 1)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other) and left == same
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert left == [np.random.random(), torch.rand(1).item()]  # noqa: NPY002


@pytest.mark.parametrize("by", ["probs", "labels"])
@pytest.mark.parametrize("seed", range(4))
def test_planted_labels_are_wrong_ones(seed, by):
    """Every planted label differs from the given one; where rows are taken to be as labelled, too."""
    labels, probs = random_problem(seed)
    likely = probs.argmax(1) if by == "probs" else labels
    rows, wrong = plant(labels, likely, probabilities.joint(labels, probs), np.random.default_rng(seed))
    assert len(rows) == len(wrong) == len(labels)
    assert (wrong != labels[rows]).all() and (wrong != likely[rows]).all()
    assert wrong.min() >= 0 and wrong.max() < probs.shape[1]


def test_planted_labels_follow_the_joint():
    """Rows and labels come as often as the joint says that a class is mislabelled so, among rows of right labels."""
    joint = np.array([[50.0, 0, 10], [30, 60, 0], [0, 20, 80]])
    labels = np.repeat([0, 1, 2], [20_000, 20_000, 20_000])
    rows, wrong = plant(labels, labels, joint, np.random.default_rng(0))
    shares = (joint + 0.1) / (joint + 0.1).sum(0)
    np.fill_diagonal(shares, 0)
    found = np.zeros((3, 3))
    np.add.at(found, (wrong, labels[rows]), 1 / len(rows))
    np.testing.assert_allclose(found, shares / shares.sum(), atol=0.01)
    assert len(np.unique(rows)) < len(rows)  # with replacement


def test_two_classes_of_which_every_label_is_the_other():
    """No label is neither the given one nor the likely class: then any but the given one will do."""
    labels = np.arange(40) % 2
    rows, wrong = plant(labels, 1 - labels, np.array([[1.0, 19], [19, 1]]), np.random.default_rng(0))
    np.testing.assert_array_equal(wrong, 1 - labels[rows])
    probs = np.full((40, 2), 0.1) + 0.8 * np.eye(2)[1 - labels]
    features = np.random.default_rng(0).normal(size=(40, 3)) + 5 * labels[:, None]
    for name in set(usable(["probs", "features"], 40)) & {"auxiliary", "ensemble"}:
        assert np.isfinite(detect(name, labels, probs=probs, features=features).score).all()
