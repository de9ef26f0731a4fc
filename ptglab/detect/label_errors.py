"""Detectors of wrong labels: given labels and probabilities, features or a history go in, `Suspects` come out.

No detector sees a true label. `probs` must be out of fold (`predict.out_of_fold`, `finetune.cross_fit`): a network
that saw a label vouches for it, and nothing in the arrays tells memorised labels from right and easy ones.

Here are the detectors that read probabilities or a history, and the table of all of them. Those that read features are
in `features`, those that learn from planted flips in `auxiliary`.
"""

import inspect
from collections.abc import Collection, Iterable

import numpy as np
from sklearn.mixture import GaussianMixture

from ptglab.detect import auxiliary, features, probabilities
from ptglab.detect.suspects import Suspects, check, check_classes, class_rows, suspects
from ptglab.detect.suspects import flag as flag
from ptglab.errors import InputError, one_of


def confidence(labels: np.ndarray, probs: np.ndarray, share: float = 0.5) -> Suspects:
    """Flag labels whose probability is below `share` of the mean in their class; the score is that probability.

    The "self-confidence" of Northcutt et al. 2021 (arXiv 1911.00068), section 3. The threshold follows the class,
    because a head fitted on noisy labels is less sure of a label the more of them are wrong.
    """
    rows = probabilities.read(labels, probs)
    thresholds = probabilities.class_thresholds(labels, rows.own, probs.shape[1])
    return suspects(labels, probs, rows.own, rows.own < share * thresholds[labels], rows.best)


def disagreement(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels that are not the most probable class; the score is their probability less the largest other.

    The baseline "predicted is not given" (C_confusion) of Northcutt et al. 2021 (arXiv 1911.00068), section 4.
    """
    rows = probabilities.read(labels, probs)
    margin = probabilities.margin(labels, probs, rows)
    return suspects(labels, probs, margin, margin < -probabilities.TIE, rows.best)


def confident_learning(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag the off-diagonal of the confident joint; the score is the probability of the given label.

    A row counts for class j if its probability reaches t_j, the mean probability of j among rows labelled j (the
    most probable class, if several reach theirs). Flagged: it counts for another class than its label, and its label
    is not the most probable class. Northcutt et al. 2021 (arXiv 1911.00068), equations 1 and 2.
    """
    rows = probabilities.read(labels, probs)
    thresholds = probabilities.class_thresholds(labels, rows.own, probs.shape[1])
    guess = probabilities.confident_classes(probs, thresholds, rows)
    flagged = rows.doubtful & (guess >= 0) & (guess != labels)
    return suspects(labels, probs, rows.own, flagged, rows.best)


def prune_by_class(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag in each class as many labels as the confident joint counts as wrong, those of the lowest probability.

    Northcutt et al. 2021 (arXiv 1911.00068), section 3.2, method 3; as in cleanlab, no label that is the most probable
    class is flagged. The score is the probability of the given label.
    """
    rows = probabilities.read(labels, probs)
    removals = probabilities.removals(labels, probs, rows)
    return suspects(labels, probs, rows.own, _least_own(labels, probs, removals) & rows.doubtful, rows.best)


def prune_by_noise_rate(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag for each pair of classes as many labels as the confident joint counts, those of the largest margin.

    The margin is the other class's probability less the label's. Northcutt et al. 2021 (arXiv 1911.00068),
    section 3.2, method 4; as in `prune_by_class`, no label that is the most probable class is flagged. The score is the
    label's probability less the largest other.
    """
    rows = probabilities.read(labels, probs)
    removals = probabilities.removals(labels, probs, rows)
    flagged = _largest_margins(labels, probs, removals) & rows.doubtful
    return suspects(labels, probs, probabilities.margin(labels, probs, rows), flagged, rows.best)


def prune_both(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag what both `prune_by_class` and `prune_by_noise_rate` flag; the score is the probability of the given label.

    Northcutt et al. 2021 (arXiv 1911.00068), section 3.2, method 5.
    """
    rows = probabilities.read(labels, probs)
    removals = probabilities.removals(labels, probs, rows)
    both = _least_own(labels, probs, removals) & _largest_margins(labels, probs, removals)
    return suspects(labels, probs, rows.own, both & rows.doubtful, rows.best)


def small_loss(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels whose loss -log p more likely belongs to the upper of two normal distributions fitted to all losses.

    Li et al. 2020 (DivideMix, arXiv 2002.07394), section 3.1, and, with beta distributions, Arazo et al. 2019
    (arXiv 1904.11238), section 3.1. Theirs are training losses early on; ours are out of fold, so there is no
    warm-up to choose. The score is the probability of the lower distribution; a thousandth of the label's own
    probability is added, which ranks losses that are equally sure.
    """
    rows = probabilities.read(labels, probs)
    small = gmm_posterior(-np.log(rows.own.clip(1e-6).astype(np.float64)))
    return suspects(labels, probs, small + 1e-3 * rows.own, small < 0.5, rows.best)


def margin_history(labels: np.ndarray, history: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels whose mean margin over the epochs of `history` belongs to the lower of two normal distributions.

    The score is that mean: the area under the margin of Pleiss et al. 2020 (arXiv 2001.10528), equations 1 and 2.
    Their threshold comes from rows trained on as one more class; ours from the margins alone. A history knows no
    other class than the label: suggestions come from `probs`.
    """
    rows = probabilities.read(labels, probs)
    margin = history.mean(0, dtype=np.float64)
    return suspects(labels, probs, margin, gmm_posterior(-margin) < 0.5, rows.best)


def forgetting(labels: np.ndarray, history: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels that the network got wrong in many epochs: their share belongs to the upper of two distributions.

    After Toneva et al. 2019 (arXiv 1812.05159), section 3, who count how often a label is forgotten, right before and
    wrong after, and treat labels that are never learned separately; ours counts every epoch with a margin below 0, so
    that these are the most suspicious. The score is the number of right epochs; the mean margin ranks equal ones.
    Suggestions come from `probs`.
    """
    rows = probabilities.read(labels, probs)
    wrong, margin = (history < 0).sum(0), history.mean(0, dtype=np.float64)
    order = (margin - margin.min()) / max(np.ptp(margin), 1e-12)  # 0 to 1
    flagged = gmm_posterior(wrong) < 0.5
    return suspects(labels, probs, len(history) - wrong + 0.9 * order, flagged, rows.best)


def gmm_posterior(values: np.ndarray) -> np.ndarray:
    """Return float64 [N]: the probability of the lower of two normal distributions fitted to `values` [N].

    It never rises with the value: outside the two means it is that at the nearer mean, or the wider distribution would
    win at both ends. It is 1 everywhere if all values are equal. Li et al. 2020 (arXiv 2002.07394), section 3.1, whose
    smallest variance of min-max scaled values is also 5e-4.
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


DETECTORS = {
    detector.__name__: detector
    for detector in (
        confidence, disagreement, confident_learning, prune_by_class, prune_by_noise_rate, prune_both, small_loss,
        features.knn, features.simifeat, features.density, margin_history, forgetting, auxiliary.auxiliary,
        auxiliary.ensemble,
    )
}  # fmt: skip
INPUTS = ("probs", "features", "history", "neighbours")  # a detector's parameters of these names are what it reads
FEWEST_ROWS = {"simifeat": 3, "auxiliary": 10, "ensemble": 10}  # of the others: 2


def usable(available: Iterable[str], rows: int) -> list[str]:
    """Return the names of the detectors that can run on so many rows with the `available` ones of INPUTS."""
    available = set(available)
    return [name for name in DETECTORS if not _missing(name, available) and rows >= FEWEST_ROWS.get(name, 2)]


def detect(
    name: str, labels, probs=None, features=None, history=None, seed: int = 0, neighbours=None, **options
) -> Suspects:
    """Return what the detector `name` finds among `labels`, the given ones, int64 [N].

    probs: out-of-fold float [N, K]; features: float [N, D]; history: float [E, N] margins over epochs; neighbours:
    what `neighbours.nearest` found among the features, at least 20 a row, so that one search serves all detectors. A
    detector gets those that its signature names; the parameters without a default are required. `options` are its own
    keyword arguments. Raises InputError for an unknown name, for an input that is missing, of the wrong shape or not
    finite, for labels outside 0 to K - 1, and for too few classes or rows.
    """
    detector = DETECTORS[one_of("detector", name, DETECTORS)]
    inputs = {"probs": probs, "features": features, "history": history}
    inputs = {key: np.asarray(array) for key, array in inputs.items() if array is not None}
    inputs = {key: array if array.dtype.kind == "f" else array.astype(np.float64) for key, array in inputs.items()}
    inputs |= {} if neighbours is None else {"neighbours": neighbours}
    if missing := _missing(name, inputs):
        raise InputError(f"detector '{name}' needs {missing}")
    parameters, labels = inspect.signature(detector).parameters, np.asarray(labels)
    used = {key: array for key, array in inputs.items() if key in parameters}
    check(labels, **used)
    if len(labels) < (fewest := FEWEST_ROWS.get(name, 2)):
        raise InputError(f"detector '{name}' needs at least {fewest} rows; there are {len(labels)}")
    check_classes(labels, used["probs"].shape[1] if "probs" in used else None)
    if "seed" in parameters:
        options["seed"] = seed
    return detector(labels.astype(np.int64, copy=False), **used, **options)


def _missing(name: str, available: Collection[str]) -> str:
    """Return what the detector needs and is not `available`, for a message; "" if nothing is missing.

    A detector all of whose inputs have a default needs one of them.
    """
    parameters = inspect.signature(DETECTORS[name]).parameters
    inputs = [key for key in INPUTS if key in parameters]
    required = [key for key in inputs if parameters[key].default is inspect.Parameter.empty]
    if required or any(key in available for key in inputs):
        return next((key for key in required if key not in available), "")
    return " or ".join(inputs)
