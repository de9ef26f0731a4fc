"""Detectors that learn from labels made wrong on purpose: what tells those from given ones tells the wrong ones."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier

from ptglab.detect import features as feature_detectors
from ptglab.detect import neighbours, noise_rate
from ptglab.detect import probabilities as confident
from ptglab.detect.suspects import Suspects, flag, suspects

Judge = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # (rows [M], a label for each [M]) -> score [M], low = suspicious


def auxiliary(
    labels: np.ndarray, probs: np.ndarray, features: np.ndarray, near: neighbours.Near | None = None, seed: int = 0
) -> Suspects:
    """Train a small network to tell planted flips from given labels, and score the given labels with it.

    N given labels, which may be wrong, against N labels planted in the place of others, which rows and which labels
    drawn as labels are estimated to go wrong here. That is learning from positive and unlabelled data: if the
    network's odds planted : given are o and a share r of the given labels is wrong, a label is wrong with
    probability r o, and o is 1/r wherever every label is wrong, as at the typical planted flip (Elkan & Noto 2008,
    section 2). Flagged above one half; the score is 1 less that probability, and a thousandth of the network's own is
    taken off too, which ranks those that are equally sure.
    """
    views = _look(labels, probs, features, near)
    score = _network(labels, views, seed)(np.arange(len(labels)), labels)
    return suspects(labels, views.belief, score, score < 0.5)


def ensemble(
    labels: np.ndarray,
    probs: np.ndarray | None = None,
    features: np.ndarray | None = None,
    near: neighbours.Near | None = None,
    seed: int = 0,
) -> Suspects:
    """Flag as many labels as are estimated to be wrong, of the lowest mean rank among several detectors.

    The members are confidence and disagreement where there are `probs`, knn, simifeat and density where there are
    `features`, auxiliary where there are both. Ours: each weighs about (A - 1/2) / (1 - A), where A is the area under
    its ROC curve at finding labels planted among rows that the unweighted mean rank takes to be right. The planted
    label of a row is judged against the given labels of all others, so nothing is fitted anew, and against no
    prediction of any member, or that member would find it best. The score is the weighted mean rank, 0 to 1. How many
    are wrong is the geometric mean of what `auxiliary` flags, which is too few where real mistakes are subtler than
    planted ones and counts double, and of the joint's estimate, which is too many where the inputs cannot tell classes
    apart.
    """
    views, n = _look(labels, probs, features, near), len(labels)
    judges = _judges(labels, views, seed)
    given = {name: judge(np.arange(n), labels) for name, judge in judges.items()}
    ranks = {name: _rank(score) for name, score in given.items()}
    rate = noise_rate.wrong_share(views.joint)
    clean = np.argsort(-sum(ranks.values()), kind="stable")[: max(2, round((1 - rate) * n))]
    rows, wrong = plant(labels[clean], labels[clean], views.joint, np.random.default_rng([seed, 1]))
    is_planted, weights = np.repeat([0, 1], len(clean)), {}
    for name, judge in judges.items():
        scores = np.concatenate([given[name][clean], judge(clean[rows], wrong)])
        area = roc_auc_score(is_planted, -scores)
        # none for one that knows nothing, unless none knows anything
        weights[name] = max(0, area - 0.5) / (1 - area + 1e-2) + 1e-6
    score = sum(weights[name] * ranks[name] for name in judges) / sum(weights.values())
    if "auxiliary" in given:
        rate = np.cbrt((given["auxiliary"] < 0.5).mean() ** 2 * rate)
    nothing = suspects(labels, views.belief, score, np.zeros(n, bool))
    return flag(nothing, round(rate * n), labels, views.belief)


def plant(
    labels: np.ndarray, likely: np.ndarray, joint: np.ndarray, draws: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw N rows, with replacement, and a wrong label for each, as `joint`, counts [given, true], says they go wrong.

    A row of class i, as `likely`, int64 [N], has it, is drawn in proportion to how often i is mislabelled, and gets
    the label j in proportion to how often i is given as j, but never its given label. Returns int64 [N] twice.
    """
    shares = joint.T + 0.1  # no pair is impossible
    shares /= shares.sum(1, keepdims=True)
    np.fill_diagonal(shares, 0)
    weights = shares[likely]  # [N, K]
    if (labels != likely).all() and len(joint) == 2:
        weights += 1  # no third class is left
    weights[np.arange(len(labels)), labels] = 0
    rows = draws.choice(len(labels), len(labels), p=weights.sum(1) / weights.sum())
    cumulative = weights[rows].cumsum(1)
    return rows, (draws.random((len(rows), 1)) * cumulative[:, -1:] >= cumulative).sum(1)


@dataclass(frozen=True)
class _Views:
    """What is known of every row and class, float [N, K] each, and `joint`, counts [given, true] of how labels go.

    probs; votes of 20 neighbours and of 10; log likelihoods; belief, the mean of probs and votes. None: no input.
    """

    joint: np.ndarray
    belief: np.ndarray
    probs: np.ndarray | None = None
    votes: np.ndarray | None = None
    votes_of_10: np.ndarray | None = None
    logs: np.ndarray | None = None


def _look(
    labels: np.ndarray, probs: np.ndarray | None, features: np.ndarray | None, near: neighbours.Near | None = None
) -> _Views:
    """Return the views of what is there; the joint with fewer wrong labels: poor inputs count their own faults too."""
    k = feature_detectors.num_classes(labels) if probs is None else probs.shape[1]
    found, joints = {"probs": probs}, [] if probs is None else [confident.joint(labels, probs)]
    if features is not None:
        similarity, index = neighbours.first(near, features, 20)
        found["votes"] = neighbours.vote(similarity, labels[index], k)
        found["votes_of_10"] = neighbours.vote(similarity[:, :10], labels[index[:, :10]], k)
        found["logs"] = feature_detectors.log_likelihoods(labels, features, k)
        joints.append(noise_rate.consensus(labels, index[:, :2], k) * len(labels))
    belief = [found[name] for name in ("probs", "votes") if found.get(name) is not None]
    return _Views(min(joints, key=noise_rate.wrong_share), np.mean(belief, 0), **found)


def _judges(labels: np.ndarray, views: _Views, seed: int) -> dict[str, Judge]:
    """Return the members: each gives any label of any row the score its detector would, were it given."""
    scores = {}
    if views.probs is not None:
        scores |= {"confidence": views.probs, "disagreement": feature_detectors.margins(views.probs)}
    if views.votes is not None:
        scores["knn"] = feature_detectors.margins(views.votes)
        scores["simifeat"] = feature_detectors.cosine(views.votes_of_10)
        scores["density"] = feature_detectors.margins(views.logs)
    judges = {name: lambda rows, y, table=table: table[rows, y] for name, table in scores.items()}
    if views.probs is not None and views.votes is not None:
        judges["auxiliary"] = _network(labels, views, seed)
    return judges


def _network(labels: np.ndarray, views: _Views, seed: int) -> Judge:
    """Return what `auxiliary` learns: the probability that a label of a row is right."""
    everyone, thresholds = np.arange(len(labels)), confident.class_thresholds(labels, views.probs)
    rows, wrong = plant(labels, views.belief.argmax(1), views.joint, np.random.default_rng(seed))
    x = np.concatenate([_signals(everyone, labels, views, thresholds), _signals(rows, wrong, views, thresholds)])
    mean, std = x.mean(0), x.std(0) + 1e-6
    is_planted = np.repeat([0, 1], len(labels))
    network = MLPClassifier((16,), alpha=1e-2, early_stopping=True, max_iter=500, random_state=seed)
    network.fit((x - mean) / std, is_planted)

    def wrongness(signals: np.ndarray) -> np.ndarray:
        return network.predict_proba((signals - mean) / std)[:, 1].clip(1e-6, 1 - 1e-6)

    typical = np.median(wrongness(x[is_planted == 1]))
    rate = min(1.0, (1 - typical) / typical)

    def judge(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
        q = wrongness(_signals(rows, y, views, thresholds))
        return 1 - np.minimum(1, rate * q / (1 - q)) + 1e-3 * (1 - q)

    return judge


def _signals(rows: np.ndarray, labels: np.ndarray, views: _Views, thresholds: np.ndarray) -> np.ndarray:
    """Return float [M, 9]: what head, neighbours and densities say of each label, and how sure they are at all."""
    probs, votes, m = views.probs[rows], views.votes[rows], np.arange(len(rows))
    read, voted = confident.read(labels, probs), confident.read(labels, votes)
    own = read.own
    return np.stack([
        own,
        np.log(own.clip(1e-6)),
        confident.margin(labels, probs, read),
        own - np.minimum(thresholds, 1)[labels],
        (probs > own[:, None]).sum(1) / probs.shape[1],
        voted.own,
        confident.margin(labels, votes, voted),
        -(probs * np.log(probs.clip(1e-12))).sum(1),
        feature_detectors.margins(views.logs[rows])[m, labels].clip(-50, 50),
    ], axis=1)  # fmt: skip


def _rank(values: np.ndarray) -> np.ndarray:
    """Return [N]: the share of `values`, [N], below each of them, and half of those equal to it."""
    order = np.sort(values)
    return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right")) / (2 * len(values))
