"""Detectors of wrong labels: the labels in hand with probabilities, features or a history in, `Suspects` out.

No detector sees a true label. `probs` must be out of fold (`predict.out_of_fold`, `finetune.cross_fit`): a network
that saw a label vouches for it. Nothing can tell from the arrays
alone: labels that were memorised and labels that are right and easy give the same probabilities.

Here are the detectors that read probabilities or a history, and the table of all of them; those that read features
are in `feature_detectors`, those that learn from labels made wrong on purpose in `planted`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.mixture import GaussianMixture

from ptglab.detect import auxiliary as planted
from ptglab.detect import features as feature_detectors
from ptglab.detect import neighbours
from ptglab.detect import probabilities as confident
from ptglab.detect.suspects import Suspects, check, check_classes, class_rows, suspects
from ptglab.detect.suspects import flag as flag
from ptglab.errors import InputError, one_of


def detect(
    name: str,
    labels: np.ndarray,
    probs: np.ndarray | None = None,
    features: np.ndarray | None = None,
    history: np.ndarray | None = None,
    seed: int = 0,
    near: neighbours.Near | None = None,
    **options,
) -> Suspects:
    """Run the detector `name` on `labels`, the given ones, int64 [N].

    probs: out-of-fold float [N, K]; features: float [N, D]; history: float [E, N] margins over epochs; DETECTORS says
    which of them each needs. near: what `neighbours.nearest` found among the features, 20 a row at least, so that one
    search serves all detectors; `options` are the detector's own keyword arguments. Raises InputError for an unknown
    name, for an input that is missing, of the wrong shape or not finite, for labels outside 0 to K - 1, and
    for too few classes or rows.
    """
    detector = DETECTORS[one_of("detector", name, DETECTORS)]
    labels, inputs = np.asarray(labels), {"probs": probs, "features": features, "history": history}
    near = near if detector.near else None
    needs = [need for need in detector.needs if need != "features" or near is None or detector.near == "beside"]
    inputs = {key: np.asarray(array) for key, array in inputs.items() if array is not None}
    if missing := [need for need in needs if need not in inputs]:
        raise InputError(f"detector '{name}' needs {missing[0]}")
    used = {key: inputs[key] for key in (*needs, *detector.takes) if key in inputs}
    if detector.takes and not used:
        raise InputError(f"detector '{name}' needs {' or '.join(detector.takes)}")
    check(labels, **used)
    if near is not None and len(near[1]) != len(labels):
        raise InputError(f"near has {len(near[1])} rows for {len(labels)} labels")
    if len(labels) < detector.rows:
        raise InputError(f"detector '{name}' needs at least {detector.rows} rows; there are {len(labels)}")
    check_classes(labels, used["probs"].shape[1] if "probs" in used else None)
    if near is not None:
        options["near"] = near
    if detector.seeded:
        options["seed"] = seed
    needed = [used.pop(need, None) for need in detector.needs]
    return detector.find(labels.astype(np.int64, copy=False), *needed, **used, **options)


def confidence(labels: np.ndarray, probs: np.ndarray, share: float = 0.5) -> Suspects:
    """Flag labels whose own probability is below `share` of the mean one in their class; the score is that probability.

    The "self-confidence" of Northcutt et al. 2021 (arXiv 1911.00068), section 3. The threshold follows the class,
    because a head fitted on noisy labels is the less sure of any label the more of them are wrong.
    """
    rows = confident.read(labels, probs)
    thresholds = confident.class_means(labels, rows.own, probs.shape[1])
    return suspects(labels, probs, rows.own, rows.own < share * thresholds[labels], rows.best)


def disagreement(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels that are not the most probable class; the score is their probability less the largest other.

    The baseline "predicted is not given" (C_confusion) of Northcutt et al. 2021 (arXiv 1911.00068), section 4.
    """
    rows = confident.read(labels, probs)
    margin = confident.margin(labels, probs, rows)
    return suspects(labels, probs, margin, margin < -confident.TIE, rows.best)


def confident_learning(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag the off-diagonal of the confident joint; the score is the probability of the given label.

    A row counts for class j if its probability reaches t_j, the mean probability of j among rows labelled j (the
    most probable class, if several reach theirs). Flagged: it counts for another class than its label, and its label
    is not the most probable class. Northcutt et al. 2021 (arXiv 1911.00068), equations 1 and 2.
    """
    rows = confident.read(labels, probs)
    doubtful = rows.doubtful
    thresholds = confident.class_means(labels, rows.own, probs.shape[1])
    guess = confident.search(probs, thresholds, rows, doubtful)
    flagged = doubtful & (guess >= 0) & (guess != labels)
    return suspects(labels, probs, rows.own, flagged, rows.best)


def prune_by_class(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag in each class as many labels as the confident joint counts as wrong, those of the lowest probability.

    Northcutt et al. 2021 (arXiv 1911.00068), section 3.2, method 3; as in cleanlab, no label that is the most probable
    class is flagged. The score is the probability of the given label.
    """
    rows = confident.read(labels, probs)
    removals = confident.removals(labels, probs, rows)
    return suspects(labels, probs, rows.own, _least_own(labels, probs, removals) & rows.doubtful, rows.best)


def prune_by_noise_rate(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag for each pair of classes as many labels as the confident joint counts, those of the largest margin.

    The margin is the other class's probability less the label's. Northcutt et al. 2021 (arXiv 1911.00068),
    section 3.2, method 4; as in `prune_by_class`, no label that is the most probable class is flagged. The score is the
    label's probability less the largest other.
    """
    rows = confident.read(labels, probs)
    removals = confident.removals(labels, probs, rows)
    flagged = _largest_margins(labels, probs, removals) & rows.doubtful
    return suspects(labels, probs, confident.margin(labels, probs, rows), flagged, rows.best)


def prune_both(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag what both `prune_by_class` and `prune_by_noise_rate` flag; the score is the probability of the given label.

    Northcutt et al. 2021 (arXiv 1911.00068), section 3.2, method 5.
    """
    rows = confident.read(labels, probs)
    removals = confident.removals(labels, probs, rows)
    both = _least_own(labels, probs, removals) & _largest_margins(labels, probs, removals)
    return suspects(labels, probs, rows.own, both & rows.doubtful, rows.best)


def small_loss(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels whose loss -log p more likely belongs to the upper of two normal distributions fitted to all losses.

    Li et al. 2020 (DivideMix, arXiv 2002.07394), section 3.1, and, with beta distributions, Arazo et al. 2019
    (arXiv 1904.11238), section 3.1. Theirs are training losses early on; ours are out of fold, so there is no
    warm-up to choose. The score is the probability of the lower distribution; a thousandth of the label's own
    probability is added, which ranks losses that are equally sure.
    """
    rows = confident.read(labels, probs)
    small = gmm_posterior(-np.log(rows.own.clip(1e-6).astype(np.float64)))
    return suspects(labels, probs, small + 1e-3 * rows.own, small < 0.5, rows.best)


def margin_history(labels: np.ndarray, history: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels whose mean margin over the epochs of `history` belongs to the lower of two normal distributions.

    The score is that mean: the area under the margin of Pleiss et al. 2020 (arXiv 2001.10528), equations 1 and 2.
    Their threshold comes from rows trained on as one more class; ours from the margins alone. A history knows no
    other class than the label: suggestions come from `probs`.
    """
    rows = confident.read(labels, probs)
    margin = history.mean(0, dtype=np.float64)
    return suspects(labels, probs, margin, gmm_posterior(-margin) < 0.5, rows.best)


def forgetting(labels: np.ndarray, history: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels that the network got wrong in many epochs: their share belongs to the upper of two distributions.

    After Toneva et al. 2019 (arXiv 1812.05159), section 3, who count the times a label is forgotten, right before and
    wrong after, and set apart what is never learned; ours counts every epoch of a margin below 0, so that never learned
    is the most suspicious. The score is the number of right epochs; the mean margin ranks equals. Suggestions come
    from `probs`.
    """
    rows = confident.read(labels, probs)
    wrong, margin = (history < 0).sum(0), history.mean(0, dtype=np.float64)
    order = (margin - margin.min()) / max(np.ptp(margin), 1e-12)  # 0 to 1
    flagged = gmm_posterior(wrong) < 0.5
    return suspects(labels, probs, len(history) - wrong + 0.9 * order, flagged, rows.best)


def gmm_posterior(values: np.ndarray) -> np.ndarray:
    """Return float64 [N]: the probability of the lower of two normal distributions fitted to `values` [N].

    It never rises with the value: outside the two means it is what it is at the nearer one, or the wider of the
    two would win at both ends. 1 everywhere if all values are one. Li et al. 2020 (arXiv 2002.07394), section 3.1,
    whose least variance of min-max scaled values is ours, 5e-4.
    """
    span = np.ptp(values)
    if not span > 1e-9:
        return np.ones(len(values))
    scaled = ((values - values.min()) / span)[:, None]
    start = {"weights_init": [0.5, 0.5], "means_init": [[0.0], [1.0]], "precisions_init": [[[25.0]], [[25.0]]]}
    mixture = GaussianMixture(2, reg_covar=5e-4, tol=1e-5, max_iter=5000, random_state=0, **start).fit(scaled)
    lower, upper = np.sort(mixture.means_[:, 0])
    return mixture.predict_proba(scaled.clip(lower, upper))[:, mixture.means_[:, 0].argmin()]


def _least_own(labels: np.ndarray, probs: np.ndarray, removals: np.ndarray) -> np.ndarray:
    """Return bool [N]: the rows of each class with the lowest probability of it, all but removals[j, j] of them."""
    chosen = np.zeros(len(labels), bool)
    for j, rows in enumerate(class_rows(labels, len(removals))):
        chosen[rows[np.argsort(probs[rows, j])[: len(rows) - removals[j, j]]]] = True
    return chosen


def _largest_margins(labels: np.ndarray, probs: np.ndarray, removals: np.ndarray) -> np.ndarray:
    """Return bool [N]: of the rows of each class j the removals[j, i] with the largest margin for each other class."""
    chosen = np.zeros(len(labels), bool)
    for j, rows in enumerate(class_rows(labels, len(removals))):
        for i in np.flatnonzero(removals[j]):
            if i != j:
                margin = probs[rows, i] - probs[rows, j]
                chosen[rows[np.argsort(-margin)[: removals[j, i]]]] = True
    return chosen


@dataclass(frozen=True)
class Detector:
    """A row of DETECTORS: a function of labels, of all it `needs` in order, and by name of what it `takes` if there.

    Seeded if it takes a `seed`; near: whether it takes neighbours, `instead` of features or `beside` them; `rows` are
    the fewest it can work on.
    """

    find: Callable[..., Suspects]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    seeded: bool = False
    near: str = ""
    rows: int = 1


DETECTORS = {
    "confidence": Detector(confidence, ("probs",)),
    "disagreement": Detector(disagreement, ("probs",)),
    "confident_learning": Detector(confident_learning, ("probs",)),
    "prune_by_class": Detector(prune_by_class, ("probs",)),
    "prune_by_noise_rate": Detector(prune_by_noise_rate, ("probs",)),
    "prune_both": Detector(prune_both, ("probs",)),
    "small_loss": Detector(small_loss, ("probs",), rows=2),
    "knn": Detector(feature_detectors.knn, ("features",), near="instead", rows=2),
    "simifeat": Detector(feature_detectors.simifeat, ("features",), near="instead", rows=3),
    "density": Detector(feature_detectors.density, ("features",), rows=2),
    "margin_history": Detector(margin_history, ("history", "probs"), rows=2),
    "forgetting": Detector(forgetting, ("history", "probs"), rows=2),
    "auxiliary": Detector(planted.auxiliary, ("probs", "features"), near="beside", seeded=True, rows=10),
    "ensemble": Detector(planted.ensemble, (), ("probs", "features"), near="beside", seeded=True, rows=10),
}
