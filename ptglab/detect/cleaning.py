"""What can be done beyond plain fine-tuning: recipes by name, and the loop that cleans labels in rounds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ptglab.detect import noise_rate
from ptglab.detect.suspects import Suspects, suspects
from ptglab.errors import one_of


@dataclass(frozen=True)
class Recipe:
    """A row of RECIPES: options of `finetune.train`, and what is done with the suspects beforehand."""

    loss: str = "cross_entropy"
    ema_decay: float = 0.0  # decay of the moving average of the weights
    curriculum: bool = False  # whether training starts on the least suspicious rows and ends on all unsuspicious ones
    clean: str = ""  # what is done with the suspects of each round: one of ACTIONS


DETECTOR = "ensemble"  # whose suspects and scores the recipes use
ACTIONS = ("drop", "relabel")
RECIPES = {
    "plain": Recipe(),
    "gce": Recipe(loss="gce"),
    "ema": Recipe(ema_decay=0.99),
    "curriculum": Recipe(curriculum=True),
    "clean_drop": Recipe(clean="drop"),
    "clean_relabel": Recipe(clean="relabel"),
}


@dataclass(frozen=True)
class Round:
    """The labels after some rounds of cleaning, see `clean`."""

    labels: np.ndarray  # int64 [N]
    trusted: np.ndarray  # bool [N]: the rows that are left
    probs: np.ndarray  # float32 [N, K], out of fold, of a model trained on these labels
    estimated: float  # the share of the trusted labels that is estimated to be wrong


def clean(
    labels_given: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray], np.ndarray],
    detect: Callable[[np.ndarray, np.ndarray, np.ndarray | None], Suspects],
    action: str,
    features: np.ndarray | None = None,
    max_rounds: int = 10,
) -> Iterator[Round]:
    """Yield rounds of training, detecting and correcting for as long as the estimated noise falls.

    fit: (labels [N], trusted bool [N]) -> out-of-fold probabilities [N, K] of a model trained on the trusted rows.
    detect: (labels [M], probs [M, K], features [M, D] or None) -> Suspects of the M trusted rows. action: "drop" the
    flagged rows for good, or "relabel" them as suggested. The first round has the given labels; the last one is the one
    to keep. Raises InputError for another action.
    """
    one_of("action", action, ACTIONS)
    labels, trusted, before = np.array(labels_given), np.ones(len(labels_given), bool), np.inf
    for _ in range(max_rounds):
        probs = fit(labels, trusted)
        rows = np.flatnonzero(trusted)
        estimated = noise_rate.estimate(labels[rows], probs.shape[1], probs[rows], bootstrap=2).rate
        if estimated >= before:
            return
        yield Round(labels.copy(), trusted.copy(), probs, estimated)
        found = detect(labels[rows], probs[rows], None if features is None else features[rows])
        flagged, before = rows[found.flagged], estimated
        if action == "relabel":
            labels[flagged] = found.suggested[found.flagged]
        else:
            trusted[flagged] = False
        if not len(flagged) or len(np.unique(labels[trusted])) < 2:
            return


def changes(first: Suspects, labels_given: np.ndarray, last: Round) -> Suspects:
    """Return as suspects the rows that `clean` dropped or relabelled, with the new label as suggestion.

    They are ranked as in `first`, the suspects of the first round, with all flagged rows before all others.
    """
    relabelled = last.labels != labels_given
    flagged = relabelled | ~last.trusted
    found = suspects(labels_given, last.probs, first.score - (np.ptp(first.score) + 1) * flagged, flagged)
    return replace(found, suggested=np.where(relabelled, last.labels, found.suggested))
