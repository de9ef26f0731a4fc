"""Detectors of wrong labels: given labels and probabilities, features or a history go in, `Suspects` come out.

No detector sees a true label. `probs` must be out of fold (`predict.out_of_fold`, `finetune.cross_fit`): a network
that saw a label vouches for it, and nothing in the arrays tells memorised labels from right and easy ones.

Here are the detectors that split losses or margins in two, and the table of all; the others are in `probabilities`,
`features` and `auxiliary`.
"""

import inspect
from collections.abc import Collection, Iterable
from functools import partial

import numpy as np
from sklearn.mixture import GaussianMixture

from ptglab.detect import auxiliary, features, probabilities
from ptglab.detect.suspects import Suspects, check, check_classes, suspects
from ptglab.detect.suspects import flag as flag
from ptglab.errors import InputError, one_of


def small_loss(labels: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels whose loss -log p more likely belongs to the upper of two normal distributions fitted to all losses.

    Li et al. 2020 (DivideMix, arXiv 2002.07394), section 3.1, where these are training losses early on; out of fold,
    there is no warm-up to choose. The score is the probability of the lower distribution, plus a thousandth of the
    label's own probability, which ranks losses that are equally sure.
    """
    rows = probabilities.read(labels, probs)
    small = gmm_posterior(-np.log(rows.own.clip(1e-6).astype(np.float64)))
    return suspects(labels, probs, small + 1e-3 * rows.own, small < 0.5, rows.best)


def margin_history(labels: np.ndarray, history: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels whose mean margin over the epochs of `history` belongs to the lower of two normal distributions.

    The score is that mean: the area under the margin of Pleiss et al. 2020 (arXiv 2001.10528), equations 1 and 2, whose
    threshold comes from rows trained on as one more class. Suggestions come from `probs`.
    """
    margin, best = history.mean(0, dtype=np.float64), probabilities.read(labels, probs).best
    return suspects(labels, probs, margin, gmm_posterior(-margin) < 0.5, best)


def forgetting(labels: np.ndarray, history: np.ndarray, probs: np.ndarray) -> Suspects:
    """Flag labels that the network got wrong in so many epochs that their number belongs to the upper of two heaps.

    The score is the number of epochs with a margin of at least 0; the mean margin ranks equal ones. Toneva et al. 2019
    (arXiv 1812.05159), section 3, count how often a label is forgotten, and set aside those never learned, which are
    the most suspicious here. Suggestions come from `probs`.
    """
    wrong, margin = (history < 0).sum(0), history.mean(0, dtype=np.float64)
    order = (margin - margin.min()) / max(np.ptp(margin), 1e-12)  # 0 to 1
    best = probabilities.read(labels, probs).best
    return suspects(labels, probs, len(history) - wrong + 0.9 * order, gmm_posterior(wrong) < 0.5, best)


def gmm_posterior(values: np.ndarray) -> np.ndarray:
    """Return float64 [N]: the probability of the lower of two normal distributions fitted to `values` [N].

    Outside the two means it is that at the nearer mean, or the wider distribution would win at both ends. It is 1 if
    all values are equal. Li et al. 2020 (arXiv 2002.07394), section 3.1, with their smallest variance of 5e-4.
    """
    span = np.ptp(values)
    if not span > 1e-9:
        return np.ones(len(values))
    scaled = ((values - values.min()) / span)[:, None]
    start = {"weights_init": [0.5, 0.5], "means_init": [[0.0], [1.0]], "precisions_init": [[[25.0]], [[25.0]]]}
    mixture = GaussianMixture(2, reg_covar=5e-4, tol=1e-5, max_iter=5000, random_state=0, **start).fit(scaled)
    lower, upper = np.sort(mixture.means_[:, 0])
    return mixture.predict_proba(scaled.clip(lower, upper))[:, mixture.means_[:, 0].argmin()]


DETECTORS = {
    "confidence": probabilities.confidence,
    "disagreement": probabilities.disagreement,
    "confident_learning": probabilities.confident_learning,
    "prune_by_class": partial(probabilities.prune, by="class"),
    "prune_by_noise_rate": partial(probabilities.prune, by="noise_rate"),
    "prune_both": probabilities.prune,
    "small_loss": small_loss,
    "knn": features.knn,
    "simifeat": features.simifeat,
    "density": features.density,
    "margin_history": margin_history,
    "forgetting": forgetting,
    "auxiliary": auxiliary.auxiliary,
    "ensemble": auxiliary.ensemble,
}
INPUTS = ("probs", "features", "history", "neighbours")  # a detector's parameters of these names are what it reads
FEWEST_ROWS = {"simifeat": 3, "auxiliary": 10, "ensemble": 10}  # of the others: 2


def usable(available: Iterable[str], rows: int) -> list[str]:
    """Return the names of the detectors that can run on so many rows with the `available` ones of INPUTS."""
    available = set(available)
    return [name for name in DETECTORS if not _missing(name, available) and rows >= FEWEST_ROWS.get(name, 2)]


def detect(name, labels, probs=None, features=None, history=None, seed=0, neighbours=None, **options) -> Suspects:
    """Return what the detector `name` finds among `labels`, the given ones, int64 [N].

    probs: out-of-fold float [N, K]; features: float [N, D]; history: float [E, N] margins over epochs; neighbours:
    what `neighbours.nearest` found among the features, at least 20 a row. A detector gets those that its signature
    names, and `options`, its own keyword arguments. Raises InputError for an unknown name, an input that is missing,
    misshapen or not finite, labels outside 0 to K - 1, and too few classes or rows.
    """
    parameters = inspect.signature(DETECTORS[one_of("detector", name, DETECTORS)]).parameters
    labels, arrays = np.asarray(labels), {"probs": probs, "features": features, "history": history}
    used = {key: np.asarray(array) for key, array in arrays.items() if key in parameters and array is not None}
    used = {key: array if array.dtype.kind == "f" else array.astype(np.float64) for key, array in used.items()}
    if "neighbours" in parameters and neighbours is not None:
        used["neighbours"] = neighbours
    if missing := _missing(name, used):
        raise InputError(f"detector '{name}' needs {missing}")
    check(labels, **used)
    if len(labels) < (fewest := FEWEST_ROWS.get(name, 2)):
        raise InputError(f"detector '{name}' needs at least {fewest} rows; there are {len(labels)}")
    check_classes(labels, used["probs"].shape[1] if "probs" in used else None)
    if "seed" in parameters:
        options["seed"] = seed
    return DETECTORS[name](labels.astype(np.int64, copy=False), **used, **options)


def _missing(name: str, available: Collection[str]) -> str:
    """Return what is needed and not `available`; if all inputs have a default, that is any one of them."""
    inputs = [each for key, each in inspect.signature(DETECTORS[name]).parameters.items() if key in INPUTS]
    required = [each.name for each in inputs if each.default is each.empty]
    if required:
        return " and ".join(key for key in required if key not in available)
    return "" if any(each.name in available for each in inputs) else " or ".join(each.name for each in inputs)
