"""Scores against the truth: accuracy over epochs, and how well wrong labels were found."""

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from ptglab.detect import neighbours


def accuracies(records: pd.DataFrame) -> dict[str, float]:
    """Return the three accuracies of a fine-tuning's records, NaN where no clean test set was there.

    `accuracy_last`: test accuracy at the last epoch; `accuracy_best`: at its best epoch, an oracle, since clean labels
    chose it; `accuracy_selected`: at the epoch with the best accuracy on *noisy* validation labels (the first such).
    """
    if "accuracy_test" not in records:
        return dict.fromkeys(("accuracy_last", "accuracy_best", "accuracy_selected"), float("nan"))
    test = records["accuracy_test"]
    chosen = test.loc[records["accuracy_validation"].idxmax()] if "accuracy_validation" in records else float("nan")
    return {"accuracy_last": test.iloc[-1], "accuracy_best": test.max(), "accuracy_selected": chosen}


def detection(suspects, is_flipped: np.ndarray) -> dict[str, float]:
    """Score a detector's `Suspects` against `is_flipped`, bool [N]; a wrong label is the positive class.

    Returns precision, recall and F1 of the flags (0 where nothing is flagged), balanced accuracy (mean of recall
    and of specificity), and of the ranking by score AUROC and average precision. What is undefined, because no label
    or every label is wrong, is NaN.
    """
    flagged, wrong = np.asarray(suspects.flagged, bool), np.asarray(is_flipped, bool)
    hits = int((flagged & wrong).sum())
    precision = hits / flagged.sum() if flagged.any() else 0.0
    recall = hits / wrong.sum() if wrong.any() else float("nan")
    specificity = (~flagged & ~wrong).sum() / (~wrong).sum() if not wrong.all() else float("nan")
    both = wrong.any() and not wrong.all()
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": 2 * hits / int(flagged.sum() + wrong.sum()) if wrong.any() else float("nan"),
        "balanced_accuracy": float((recall + specificity) / 2),
        "auroc": float(roc_auc_score(wrong, -suspects.score)) if both else float("nan"),
        "average_precision": float(average_precision_score(wrong, -suspects.score)) if both else float("nan"),
    }


def knn_accuracy(
    bank: np.ndarray, bank_labels: np.ndarray, features: np.ndarray, labels: np.ndarray, k: int = 20
) -> float:
    """Return the accuracy of a weighted vote of the `k` nearest rows of `bank` [M, D] for `features` [N, D].

    Wu et al. 2018 (arXiv 1805.01978), section 3.4, with temperature 0.1.
    """
    similarity, index = neighbours.nearest(features, k, bank)
    votes = neighbours.vote(similarity, np.asarray(bank_labels)[index], int(max(bank_labels.max(), labels.max())) + 1)
    return float((votes.argmax(1) == labels).mean())


def ranking(score: np.ndarray, is_flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (recall [T], precision [T]) of flagging every score below each threshold, recall from 0 to 1."""
    precision, recall, _ = precision_recall_curve(np.asarray(is_flipped, bool), -np.asarray(score))
    return recall[::-1], precision[::-1]


def errors_found(score: np.ndarray, is_flipped: np.ndarray) -> np.ndarray:
    """Return float64 [N]: the share of the wrong labels found once 1, 2, ..., N rows are checked, lowest score first.

    score: [N], equal ones are checked in row order; is_flipped: bool [N]. NaN everywhere if no label is wrong.
    """
    wrong = np.asarray(is_flipped, bool)
    found = wrong[np.argsort(score, kind="stable")].cumsum()
    return found / wrong.sum() if wrong.any() else np.full(len(wrong), np.nan)
