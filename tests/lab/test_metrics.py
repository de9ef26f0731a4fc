import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as peer

from ptglab.detect.label_errors import Suspects
from ptglab.lab import metrics


def suspects(score, flagged) -> Suspects:
    return Suspects(np.asarray(score, np.float32), np.asarray(flagged, bool), np.zeros(len(score), np.int64))


@pytest.mark.parametrize("seed", range(6))
def test_detection_against_sklearn(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(10, 500))
    wrong = rng.random(n) < rng.uniform(0.1, 0.9)
    score = (rng.normal(size=n) - wrong).astype(np.float32)
    score = score.round(1) if seed % 2 else score  # with ties
    flagged = rng.random(n) < np.where(wrong, *rng.random(2))
    assert metrics.detection(suspects(score, flagged), wrong) == pytest.approx({
        "precision": peer.precision_score(wrong, flagged, zero_division=0),
        "recall": peer.recall_score(wrong, flagged),
        "f1": peer.f1_score(wrong, flagged),
        "balanced_accuracy": peer.balanced_accuracy_score(wrong, flagged),
        "auroc": peer.roc_auc_score(wrong, -score),
        "average_precision": peer.average_precision_score(wrong, -score),
    })  # fmt: skip


NAN = float("nan")


@pytest.mark.parametrize(
    ("flagged", "wrong", "expected"),
    [  # precision, recall, f1, balanced accuracy, AUROC, average precision; scores 0 1 2 3
        ([0, 0, 0, 0], [1, 1, 0, 0], (0, 0, 0, 0.5, 1, 1)),
        ([1, 1, 1, 1], [0, 0, 1, 1], (0.5, 1, 2 / 3, 0.5, 0, (1 / 3 + 1 / 2) / 2)),
        ([1, 0, 0, 0], [0, 0, 0, 0], (0, NAN, NAN, NAN, NAN, NAN)),
        ([0, 0, 0, 0], [0, 0, 0, 0], (0, NAN, NAN, NAN, NAN, NAN)),
        ([1, 0, 0, 0], [1, 1, 1, 1], (1, 0.25, 0.4, NAN, NAN, NAN)),
        ([0, 0, 0, 0], [1, 1, 1, 1], (0, 0, 0, NAN, NAN, NAN)),
    ],
)
def test_detection_at_the_edges(flagged, wrong, expected):
    found = metrics.detection(suspects([0, 1, 2, 3], flagged), np.array(wrong, bool))
    assert list(found) == ["precision", "recall", "f1", "balanced_accuracy", "auroc", "average_precision"]
    assert all(type(value) is float for value in found.values())
    assert tuple(found.values()) == pytest.approx(expected, nan_ok=True)


RECORDS = pd.DataFrame({
    "epoch": [1, 2, 3, 4],
    "accuracy_train": [0.3, 0.5, 0.7, 0.9],
    "accuracy_validation": [0.30, 0.55, 0.55, 0.40],
    "accuracy_test": [0.50, 0.80, 0.91, 0.60],
})  # fmt: skip


def test_accuracies_of_a_hand_made_run():
    """Noisy validation is best at epochs 2 and 3: the first counts, not the better on test, nor the last."""
    assert metrics.accuracies(RECORDS) == {"accuracy_last": 0.6, "accuracy_best": 0.91, "accuracy_selected": 0.8}
    later = RECORDS.assign(accuracy_validation=[0.1, 0.2, 0.3, 0.4])
    assert metrics.accuracies(later)["accuracy_selected"] == 0.6


@pytest.mark.parametrize(
    ("records", "known"),
    [
        (RECORDS.drop(columns="accuracy_validation"), {"accuracy_last": 0.6, "accuracy_best": 0.91}),
        (RECORDS.drop(columns="accuracy_test"), {}),
        (pd.DataFrame(), {}),
    ],
)
def test_accuracies_that_nobody_measured_are_nan(records, known):
    accuracies = metrics.accuracies(records)
    assert list(accuracies) == ["accuracy_last", "accuracy_best", "accuracy_selected"]
    for name, value in accuracies.items():
        assert value == known[name] if name in known else math.isnan(value)


def blobs(seed: int, k: int = 4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, 150)
    features = (rng.normal(size=(k, 6))[labels] + rng.normal(size=(150, 6))).astype(np.float32)
    return features[:90], labels[:90], features[90:], labels[90:]


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_knn_accuracy_by_hand(neighbours):
    bank, bank_labels, features, labels = blobs(neighbours)
    right = 0
    for x, label in zip(features, labels, strict=True):
        cosines = [x @ y / math.sqrt((x @ x) * (y @ y)) for y in bank]
        votes = [0.0] * 4
        for j in sorted(range(len(bank)), key=lambda j: -cosines[j])[:neighbours]:
            votes[bank_labels[j]] += math.exp(cosines[j] / 0.1)
        right += votes.index(max(votes)) == label
    assert metrics.knn_accuracy(bank, bank_labels, features, labels, k=neighbours) == right / len(labels)
    assert 0.3 < right / len(labels) < 1


def test_knn_accuracy_takes_read_only_arrays_silently():
    """Arrays of a run folder are read-only memory maps, of which torch warns once a process; here each time."""
    arrays = blobs(0)
    for array in arrays:
        array.flags.writeable = False
    torch.set_warn_always(True)
    try:
        assert 0 < metrics.knn_accuracy(*arrays) <= 1
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("seed", range(4))
def test_ranking_by_hand(seed):
    """Every distinct score as a threshold, and flagging nothing; recall from 0 to 1."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(60) < 0.4
    score = (rng.normal(size=60) - wrong).round(1)
    recall, precision = metrics.ranking(score.astype(np.float32), wrong)
    assert (recall[0], precision[0]) == (0, 1) and recall[-1] == 1 and (np.diff(recall) >= 0).all()
    assert len(recall) == len(np.unique(score)) + 1
    for i, threshold in enumerate(np.unique(score), start=1):
        hits = sum(w for s, w in zip(score, wrong, strict=True) if s <= threshold)
        assert recall[i] == pytest.approx(hits / wrong.sum())
        assert precision[i] == pytest.approx(hits / (score <= threshold).sum())


@pytest.mark.parametrize("seed", range(4))
def test_errors_found_by_hand(seed):
    """Row by row, the lowest score first, the first row of equals first."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(60) < 0.4
    score = (rng.normal(size=60) - wrong).round(1)
    left, found = list(range(60)), []
    while left:
        left.remove(row := min(left, key=lambda i: (score[i], i)))
        found.append(found[-1] + wrong[row] if found else int(wrong[row]))
    share = metrics.errors_found(score.astype(np.float32), wrong)
    assert share == pytest.approx(np.array(found) / wrong.sum())
    assert len(share) == 60 and share[-1] == 1 and (np.diff(share) >= 0).all()


def test_errors_found_where_no_label_is_wrong_is_nan():
    assert np.isnan(metrics.errors_found(np.arange(3.0), np.zeros(3, bool))).all()
    assert metrics.errors_found([], []).shape == (0,)
