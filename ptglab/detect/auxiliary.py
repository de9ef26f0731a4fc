"""Detectors that learn from labels made wrong on purpose: what tells planted labels from given ones."""

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ptglab.detect import calibration, noise_rate
from ptglab.detect.calibration import Views, views_of
from ptglab.detect.features import cosine
from ptglab.detect.neighbours import Neighbours
from ptglab.detect.probabilities import margin
from ptglab.detect.suspects import Suspects, flag, suspects


def auxiliary(labels, probs, features, neighbours: Neighbours | None = None, seed: int = 0) -> Suspects:
    """Flag labels that a small network, trained to tell planted flips from given labels, takes to be wrong.

    N flips planted where labels are estimated to go wrong are the positives, the N given labels, of which a share r is
    wrong, are unlabelled. If the network's odds planted : given are o, a label is wrong with probability r o (Elkan &
    Noto 2008, section 2); r is 1 / o at the typical planted flip, where every label is wrong. Flagged above one half.
    The score is 1 less that probability, plus a thousandth of the network's probability of a given label, to rank ties.
    """
    views, joint = views_of(labels, probs, features, neighbours)
    score = learn(labels, views, joint, seed)(np.arange(len(labels)), labels)
    return suspects(labels, views["belief"], score, score < 0.5)


def ensemble(labels, probs=None, features=None, neighbours: Neighbours | None = None, seed: int = 0) -> Suspects:
    """Flag as many labels as are estimated to be wrong, those that several detectors and a model together rank lowest.

    The members are confidence and disagreement if there are `probs`, knn, simifeat and density if there are
    `features` (the first two of them with `neighbours` alone). Ours: a member weighs about (A - 1/2) / (1 - A), where A
    is the area under its ROC curve at finding labels planted among the rows that the unweighted mean rank takes to be
    right; what is planted depends on no member's prediction, or that member would find it best. The score, 0 to 1, is
    two thirds the weighted mean rank, and one third the rank of the probability that a label is right
    (`calibration.wrong`). The number of wrong labels is the sum of those probabilities, too few where mistakes are
    people's, and to one third, as a geometric mean, the joint's estimate, too many where inputs cannot tell classes
    apart.
    """
    (views, joint), n = views_of(labels, probs, features, neighbours), len(labels)
    given = member_scores(np.arange(n), labels, views)
    ranks = {name: (rankdata(score) - 0.5) / n for name, score in given.items()}
    rate = noise_rate.wrong_share(joint)
    clean = np.argsort(-sum(ranks.values()), kind="stable")[: max(2, round((1 - rate) * n))]
    rows, wrong = plant(labels[clean], labels[clean], joint, np.random.default_rng([seed, 1]))
    score, total, planted = np.zeros(n), 0, member_scores(clean[rows], wrong, views)
    for name, rank in ranks.items():
        doubt = -np.concatenate([given[name][clean], planted[name]])
        area = roc_auc_score(np.repeat([0, 1], len(clean)), doubt)
        weight = max(0, area - 0.5) / (1 - area + 1e-2) + 1e-6  # even if none of the members knows anything
        score, total = score + weight * rank, total + weight
    likely = calibration.wrong(labels, views)(np.arange(n), labels)
    score = (2 * score / total + (rankdata(-likely) - 0.5) / n) / 3
    unflagged = suspects(labels, views["belief"], score, np.zeros(n, bool))
    return flag(unflagged, round(np.cbrt(likely.mean() ** 2 * rate) * n), labels, views["belief"])


def plant(labels, likely, joint: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, labels), int64 [N] each: N rows drawn with replacement, and a wrong label for each.

    They follow `joint`, counts [given, true]. A row whose class is `likely` i, int64 [N], is drawn in proportion to how
    often i is mislabelled, and gets label j in proportion to how often i is given as j, but never its given label.
    """
    shares = joint.T + 0.1  # no pair is impossible
    shares /= shares.sum(1, keepdims=True)
    np.fill_diagonal(shares, 0)
    weights = shares[likely]  # [N, K]
    if (labels != likely).all() and len(joint) == 2:
        weights += 1  # no third class is left
    weights[np.arange(len(labels)), labels] = 0
    rows = rng.choice(len(labels), len(labels), p=weights.sum(1) / weights.sum())
    cumulative = weights[rows].cumsum(1)
    return rows, (rng.random((len(rows), 1)) * cumulative[:, -1:] >= cumulative).sum(1)


def learn(labels: np.ndarray, views: Views, joint: np.ndarray, seed: int) -> Callable:
    """Return the function (rows [M], labels [M]) -> score [M] of `auxiliary`, learned from N planted flips."""
    rows, wrong = plant(labels, views["belief"].argmax(1), joint, np.random.default_rng(seed))
    given, planted = signals(np.arange(len(labels)), labels, views), signals(rows, wrong, views)
    mlp = MLPClassifier((16,), alpha=1e-2, early_stopping=True, max_iter=500, random_state=seed)
    network = make_pipeline(StandardScaler(), mlp)
    network.fit(np.concatenate([given, planted]), np.repeat([0, 1], len(labels)))

    def doubt(signals: np.ndarray) -> np.ndarray:
        return network.predict_proba(signals)[:, 1].clip(1e-6, 1 - 1e-6)

    typical = np.median(doubt(planted))
    rate = min(1.0, (1 - typical) / typical)  # of wrong labels among the given ones

    def score(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        q = doubt(signals(rows, labels, views))
        return 1 - np.minimum(1, rate * q / (1 - q)) + 1e-3 * (1 - q)

    return score


def member_scores(rows: np.ndarray, labels: np.ndarray, views: Views) -> dict[str, np.ndarray]:
    """Return the score [M] that each detector but `auxiliary` gives M rows with these labels, int64 [M] each."""
    scores = {}
    if "probs" in views:
        probs = views["probs"][rows]
        scores |= {"confidence": probs[np.arange(len(rows)), labels], "disagreement": margin(labels, probs)}
    if "votes" in views:
        scores["knn"] = margin(labels, views["votes"][rows])
        scores["simifeat"] = cosine(labels, views["votes_of_10"][rows])
    if "logs" in views:
        scores["density"] = margin(labels, views["logs"][rows])
    return scores


def signals(rows: np.ndarray, labels: np.ndarray, views: Views) -> np.ndarray:
    """Return [M, 9]: what probabilities, votes and densities say of M rows with these labels, and how sure they are."""
    scores, probs = member_scores(rows, labels, views), views["probs"][rows]
    own = scores["confidence"]
    return np.stack([
        own,
        np.log(own.clip(1e-6)),
        scores["disagreement"],
        own - np.minimum(views["thresholds"], 1)[labels],
        (probs > own[:, None]).mean(1),
        views["votes"][rows, labels],
        scores["knn"],
        -(probs * np.log(probs.clip(1e-12))).sum(1),
        scores["density"].clip(-50, 50),
    ], axis=1)  # fmt: skip
