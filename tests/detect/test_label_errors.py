"""Detectors that read probabilities or a history, and what all detectors have in common."""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from expected import refused
from wrong_labels import blobs, both_types, overlapping, random_problem

from ptglab.detect import neighbours, probabilities
from ptglab.detect import suspects as suspects_module
from ptglab.detect.features import log_likelihoods
from ptglab.detect.label_errors import DETECTORS, FEWEST_ROWS, INPUTS, Suspects, detect, gmm_posterior, usable
from ptglab.lab import metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cleanlab.count import get_confident_thresholds
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_normalized_margin_for_each_label, get_self_confidence_for_each_label

every_detector = pytest.mark.parametrize("name", DETECTORS)
LEARNERS = {"auxiliary", "ensemble"}
CLEANLAB = {
    "confident_learning": "confident_learning",
    "prune_by_class": "prune_by_class",
    "prune_by_noise_rate": "prune_by_noise_rate",
    "prune_both": "both",
    "disagreement": "predicted_neq_given",
}


def cleanlab_flags(name: str, labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return what cleanlab flags; it warns of classes of fewer than two rows, in which neither of us prunes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "May not flag all label issues")
        return find_label_issues(labels, probs, filter_by=CLEANLAB[name], n_jobs=1)


@both_types
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", CLEANLAB)
def test_flags_are_cleanlabs(name, seed, dtype):
    labels, probs = random_problem(seed, dtype)
    peer = cleanlab_flags(name, labels, probs)
    assert peer.any() and not peer.all()
    np.testing.assert_array_equal(detect(name, labels, probs=probs).flagged, peer)


@pytest.mark.parametrize("name", CLEANLAB)
@pytest.mark.parametrize("case", ["never believed", "one row", "near ties"])
def test_flags_are_cleanlabs_at_the_edges(name, case):
    """A class nobody has any probability of; a class of one row; labels a millionth behind the likeliest class."""
    labels, probs = random_problem(6 if case == "near ties" else 7)
    if case == "never believed":  # its threshold is a floor, not 0, which every row would reach
        labels[:40] = 2
        probs[:, 2] = 0
    elif case == "one row":
        labels[labels == 2] = 0
        labels[5] = 2
        probs[5] = np.roll(np.sort(probs[5]), 1)
    else:
        probs += np.random.default_rng(6).uniform(0, 1e-7, probs.shape)
        rows = probabilities.read(labels, probs)
        assert ((rows.own < rows.largest) & (rows.own > rows.largest - 1e-6)).any()
    peer = cleanlab_flags(name, labels, probs)
    assert peer.any()
    np.testing.assert_array_equal(detect(name, labels, probs=probs).flagged, peer)


@both_types
@pytest.mark.parametrize(("n", "k", "noise", "signal"), [(8000, 50, 0.9, 3), (4000, 300, 0.7, 4)])
def test_flags_are_cleanlabs_at_size(n, k, noise, signal, dtype):
    """Many rows reach no threshold and many several; with 300 classes a label no longer fits in a byte."""
    rng = np.random.default_rng(k)
    true = rng.integers(0, k, n)
    labels = np.where(rng.random(n) < np.linspace(0.05, noise, k)[true], rng.integers(0, k, n), true)
    logits = 10 ** rng.uniform(-1, 0.7, (n, 1)) * (rng.normal(size=(n, k)) + signal * np.eye(k)[true])
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs = (probs / probs.sum(1, keepdims=True)).astype(dtype)
    reached = (probs >= get_confident_thresholds(labels, probs) - 1e-6).sum(1)
    assert min((reached == 0).mean(), (reached == 1).mean(), (reached > 1).mean()) > 0.02
    for name in CLEANLAB:
        peer = cleanlab_flags(name, labels, probs)
        assert 0.1 < peer.mean() < 0.6
        np.testing.assert_array_equal(detect(name, labels, probs=probs).flagged, peer)


@both_types
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*CLEANLAB, "confidence"])
def test_scores_are_cleanlabs(name, seed, dtype):
    labels, probs = random_problem(seed, dtype)
    score = detect(name, labels, probs=probs).score
    if name in ("disagreement", "prune_by_noise_rate"):
        margin = get_normalized_margin_for_each_label(labels, probs)
        assert (np.diff(margin[np.argsort(score)]) > -1e-6).all()
        np.testing.assert_allclose(score, 2 * margin - 1, atol=1e-6)
    else:
        np.testing.assert_array_equal(score, get_self_confidence_for_each_label(labels, probs).astype(np.float32))


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_confidence_flags_by_hand(share):
    labels, probs = random_problem(4)
    expected = []
    for label, row in zip(labels, probs, strict=True):
        typical = np.mean([p[label] for given, p in zip(labels, probs, strict=True) if given == label])
        expected.append(row[label] < share * typical)
    assert 0 < np.mean(expected) < 1
    np.testing.assert_array_equal(detect("confidence", labels, probs=probs, share=share).flagged, expected)


def density(x: float, mean: float, variance: float) -> float:
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def literal_lower_of_two(values: list[float]) -> list[float]:
    """Fit two normals to values scaled to 0 to 1, from means 0 and 1, till the mean log likelihood gains no more."""
    x = [(v - min(values)) / (max(values) - min(values)) for v in values]
    weights, means, variances, before = [0.5, 0.5], [0.0, 1.0], [0.04, 0.04], -math.inf
    while True:
        joint = [[weights[c] * density(v, means[c], variances[c]) for c in (0, 1)] for v in x]
        gain, before = (
            np.mean([math.log(a + b) for a, b in joint]) - before,
            np.mean([math.log(a + b) for a, b in joint]),
        )
        upper = [b / (a + b) for a, b in joint]
        for c, share in enumerate(([1 - u for u in upper], upper)):
            weights[c] = sum(share) / len(x)
            means[c] = sum(s * v for s, v in zip(share, x, strict=True)) / sum(share)
            variances[c] = sum(s * (v - means[c]) ** 2 for s, v in zip(share, x, strict=True)) / sum(share) + 5e-4
        if abs(gain) < 1e-5:
            break
    low = 0 if means[0] < means[1] else 1
    found = []
    for v in x:
        v = min(max(v, min(means)), max(means))
        both = [weights[c] * density(v, means[c], variances[c]) for c in (0, 1)]
        found.append(both[low] / sum(both))
    return found


def two_heaps(share: float, seed: int, n: int = 400, apart: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Return (values, bool [N] of the upper heap): normals of deviations 1 and 2, a `share` in the upper one."""
    rng = np.random.default_rng(seed)
    upper = rng.random(n) < share
    return np.where(upper, apart + 2 * rng.normal(size=n), rng.normal(size=n)), upper


@pytest.mark.parametrize("seed", range(6))
def test_lower_of_two_is_a_literal_fit(seed):
    """Of two heaps apart, of one heap, of skewed losses."""
    rng = np.random.default_rng(seed)
    values = (two_heaps(0.3, seed)[0], two_heaps(0.0, seed)[0], rng.exponential(size=400))[seed % 3]
    np.testing.assert_allclose(gmm_posterior(values), literal_lower_of_two(list(values)), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_lower_of_two_never_rises_with_the_value(seed):
    """The wider of the two would otherwise win at both ends."""
    values = np.sort(two_heaps(0.3, seed)[0] * (-1) ** seed)  # the wider one above, and below
    found = gmm_posterior(values)
    assert found.min() >= 0 and found.max() <= 1 and found[0] > 0.9 > 0.1 > found[-1]
    assert np.diff(found).max() <= 1e-9
    np.testing.assert_allclose(gmm_posterior(100 * values - 3), found, atol=1e-6)
    np.testing.assert_array_equal(gmm_posterior(np.full(9, 2.5)), np.ones(9))


@both_types
@pytest.mark.parametrize("seed", [1, 4])
def test_small_loss_by_hand(seed, dtype):
    labels, probs = random_problem(seed, dtype)
    labels, probs = labels[:300], probs[:300]
    own = [float(row[label]) for label, row in zip(labels, probs, strict=True)]
    small = np.array(literal_lower_of_two([-math.log(max(p, 1e-6)) for p in own]))
    suspects = detect("small_loss", labels, probs=probs)
    np.testing.assert_allclose(suspects.score, small + 1e-3 * np.array(own), atol=1e-5)
    np.testing.assert_array_equal(suspects.flagged, small < 0.5)
    assert suspects.flagged.any() and not suspects.flagged.all()
    order = np.argsort(suspects.score, kind="stable")
    assert (np.diff(np.array(own)[order]) > -1e-4).all()  # the ranking is that of the loss


def test_margin_history_is_the_area_under_the_margin():
    """Equations 1 and 2 of Pleiss et al.: the mean over epochs of the label's logit less the largest other."""
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 4, 60), rng.normal(size=(7, 60, 4))
    logits[:, np.arange(60), labels] += np.where(np.arange(60) < 20, -0.3, 1.2)
    margins, areas = np.empty((7, 60), np.float32), np.zeros(60)
    for t in range(7):
        for i, label in enumerate(labels):
            margins[t, i] = logits[t, i, label] - max(logits[t, i, c] for c in range(4) if c != label)
            areas[i] += (logits[t, i, label] - max(logits[t, i, c] for c in range(4) if c != label)) / 7
    suspects = detect("margin_history", labels, probs=np.full((60, 4), 0.25), history=margins)
    np.testing.assert_allclose(suspects.score, areas, atol=1e-5)
    np.testing.assert_array_equal(suspects.flagged, np.array(literal_lower_of_two(list(-areas))) < 0.5)
    assert (suspects.flagged == (np.arange(60) < 20)).mean() > 0.75


def test_forgetting_by_hand():
    """Never learned is the worst, then by the number of wrong epochs, of equals the lower mean; 0 is right."""
    history = np.array([
        [-1.0, -1, -1, 2, 2, 9, 1],
        [-2.0, -1, -1, 2, 2, 9, 1],
        [-1.0, 5, -1, 2, -3, 9, 0],
        [-1.0, 5, 4, 2, 2, 9, 1],
    ])  # fmt: skip
    suspects = detect("forgetting", np.arange(7) % 2, probs=np.full((7, 2), 0.5), history=history)
    assert list(np.floor(suspects.score)) == [0, 2, 1, 4, 3, 4, 4]
    assert list(np.argsort(suspects.score)) == [0, 2, 1, 4, 6, 3, 5]
    mean = history.mean(0)
    fraction = 0.9 * (mean - mean.min()) / (mean.max() - mean.min())
    np.testing.assert_allclose(suspects.score - np.floor(suspects.score), fraction, atol=1e-6)
    wrong = [float(sum(m < 0 for m in column)) for column in history.T]
    np.testing.assert_array_equal(suspects.flagged, np.array(literal_lower_of_two(wrong)) < 0.5)


@pytest.mark.parametrize("name", ["margin_history", "forgetting"])
def test_a_history_that_says_nothing_flags_nothing(name):
    suspects = detect(name, np.arange(20) % 2, probs=np.full((20, 2), 0.5), history=np.ones((5, 20), np.float32))
    assert not suspects.flagged.any() and np.isfinite(suspects.score).all()


@every_detector
@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_contract_on_planted_flips(name, rate):
    given, probs, features, history, true = blobs(rate, 1)
    is_flipped = given != true
    suspects = detect(name, given, probs, features, history)
    assert isinstance(suspects, Suspects)
    for array, dtype in ((suspects.score, np.float32), (suspects.flagged, bool), (suspects.suggested, np.int64)):
        assert type(array) is np.ndarray and array.dtype == dtype and array.shape == given.shape
    assert np.isfinite(suspects.score).all()
    assert metrics.detection(suspects, is_flipped)["auroc"] > 0.9
    assert suspects.suggested.min() >= 0 and suspects.suggested.max() < 5
    assert (suspects.suggested != given)[suspects.flagged].all()
    found = suspects.flagged & is_flipped
    assert found.sum() > 0.75 * is_flipped.sum()
    assert found.sum() > 0.75 * suspects.flagged.sum()
    assert (suspects.suggested == true)[found].mean() > 0.9


@every_detector
def test_a_suggestion_for_a_flagged_label_is_the_best_other_class(name):
    labels, probs, features, history, _ = overlapping(0.4, 3)
    suspects = detect(name, labels, probs, features, history)
    similarity, index = neighbours.nearest(features, 20)
    votes, votes_of_10 = (neighbours.vote(similarity[:, :k], labels[index[:, :k]], 5) for k in (20, 10))
    both = (probs + votes) / 2
    logs = log_likelihoods(labels, features, 5)
    beliefs = {"knn": votes, "simifeat": votes_of_10, "density": logs, "auxiliary": both, "ensemble": both}
    belief = beliefs.get(name, probs)
    assert suspects.flagged.any()
    for i in np.flatnonzero(suspects.flagged):
        assert suspects.suggested[i] == max((c for c in range(5) if c != labels[i]), key=lambda c: belief[i, c])
    rest = ~suspects.flagged
    np.testing.assert_array_equal(suspects.suggested[rest], belief.argmax(1)[rest])


@every_detector
def test_order_of_rows_does_not_matter(name):
    """Rows shuffled, results shuffled alike; those that learn draw by position, so only their ranking stays."""
    labels, probs, features, history, _ = overlapping(0.2, 0)
    order = np.random.default_rng(0).permutation(len(labels))
    straight = detect(name, labels, probs, features, history)
    shuffled = detect(name, labels[order], probs[order], features[order], history[:, order])
    if name in LEARNERS:
        assert np.corrcoef(shuffled.score, straight.score[order])[0, 1] > 0.9
    else:
        np.testing.assert_allclose(shuffled.score, straight.score[order], atol=1e-4)
        np.testing.assert_array_equal(shuffled.flagged, straight.flagged[order])


@pytest.fixture(params=[1, 3, 4], ids=["K20", "ties", "empty_class"])
def problem(request) -> dict[str, np.ndarray]:
    """Return labels, probs, features and a history of 120 rows."""
    labels, probs = random_problem(request.param, np.float32)
    rng = np.random.default_rng(request.param)
    features, history = rng.normal(size=(120, 6)).astype(np.float32), rng.normal(size=(5, 120)).astype(np.float32)
    return {"labels": labels[:120], "probs": probs[:120], "features": features, "history": history}


def assert_same(ours: Suspects, expected: Suspects, atol: float = 0):
    np.testing.assert_allclose(ours.score, expected.score, rtol=0, atol=atol)
    np.testing.assert_array_equal(ours.flagged, expected.flagged)
    np.testing.assert_array_equal(ours.suggested, expected.suggested)


@every_detector
def test_arrays_may_lie_in_memory_as_they_like_and_are_left_as_they_were(tmp_path, name, problem):
    """Mapped arrays of a run folder are read-only, of which torch warns once a process; here each time."""
    expected, before = detect(name, **problem), {key: array.copy() for key, array in problem.items()}
    strided = np.full((240, 3 * problem["probs"].shape[1]), np.nan, np.float32)[::-2, 1::3]
    strided[:] = problem["probs"]
    for key, array in problem.items():
        np.save(tmp_path / f"{key}.npy", array)
    mapped = {key: np.load(tmp_path / f"{key}.npy", mmap_mode="r") for key in problem}
    torch.set_warn_always(True)
    try:
        for same in (problem | {"probs": np.asfortranarray(strided)}, problem | {"probs": strided}, mapped):
            assert_same(detect(name, **same), expected, 1e-3 * (name in LEARNERS))
    finally:
        torch.set_warn_always(False)
    for key, array in problem.items():
        np.testing.assert_array_equal(array, before[key])


@every_detector
def test_blocks_of_any_size_and_any_number_of_threads_find_the_same(monkeypatch, name, problem):
    """Bit for bit; and with the neighbours found before nothing is searched: one search serves all detectors."""
    expected, threads = detect(name, **problem), torch.get_num_threads()
    found = neighbours.nearest(problem["features"], 25)
    monkeypatch.setattr(neighbours, "nearest", None)
    try:
        for number, rows in ((1, 1), (3, 7)):
            torch.set_num_threads(number)
            monkeypatch.setattr(probabilities, "BLOCK_ELEMENTS", 5 * rows)
            monkeypatch.setattr(neighbours, "BLOCK_ROWS", rows)
            monkeypatch.setattr(suspects_module, "BLOCK_ROWS", rows)
            assert_same(detect(name, **problem, neighbours=found), expected)
    finally:
        torch.set_num_threads(threads)


PARAMETERS = {name: inspect.signature(function).parameters for name, function in DETECTORS.items()}


@pytest.mark.parametrize("name", [name for name, parameters in PARAMETERS.items() if "probs" in parameters])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_probabilities_that_are_not_finite_are_refused(name, value, problem):
    problem["probs"][17, 1] = value
    refused("probs holds values that are not finite", call=detect)(name, **problem)


@every_detector
def test_no_detector_can_see_the_truth_and_each_gets_what_its_signature_names(name):
    assert set(PARAMETERS[name]) <= {"labels", *INPUTS, "seed", "share", "k", "ratio", "lead", "by"}
    labels, probs, features, history, _ = overlapping(0.2, 0)
    inputs = {"probs": probs, "features": features, "history": history}
    used = {key: array for key, array in inputs.items() if key in PARAMETERS[name]}
    direct = DETECTORS[name](labels, **used, **({"seed": 7} if "seed" in PARAMETERS[name] else {}))
    assert_same(detect(name, labels, **used, seed=7), direct)
    assert_same(detect(name, labels, **inputs, seed=7), direct)
    as_lists = {key: array.tolist() for key, array in used.items()}
    np.testing.assert_allclose(detect(name, labels.tolist(), **as_lists, seed=7).score, direct.score, atol=1e-3)


FROM_PROBS = {"confidence", "disagreement", "confident_learning", "prune_by_class", "prune_by_noise_rate", "prune_both",
              "small_loss"}  # fmt: skip
FROM_NEIGHBOURS, FROM_HISTORY = {"knn", "simifeat"}, {"margin_history", "forgetting"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], set()),
        (["history"], set()),
        (["probs"], FROM_PROBS | {"ensemble"}),
        (["features"], FROM_NEIGHBOURS | {"density", "ensemble"}),
        (["neighbours"], FROM_NEIGHBOURS | {"ensemble"}),
        (["probs", "history"], FROM_PROBS | FROM_HISTORY | {"ensemble"}),
        (["probs", "neighbours"], FROM_PROBS | FROM_NEIGHBOURS | {"ensemble"}),
        (["probs", "features"], FROM_PROBS | FROM_NEIGHBOURS | {"density"} | LEARNERS),
        (INPUTS, set(DETECTORS)),
    ],
)
def test_usable_detectors_run_and_the_others_name_what_they_miss(given, expected):
    labels, probs, features, history, _ = overlapping(0.2, 0)
    found = neighbours.nearest(features, 20)
    inputs = {"probs": probs, "features": features, "history": history, "neighbours": found}
    inputs = {key: array for key, array in inputs.items() if key in given}
    names = usable(given, len(labels))
    assert set(names) == set(expected) and names == [name for name in DETECTORS if name in expected]
    for name in expected:
        assert np.isfinite(detect(name, labels, **inputs).score).all()
    for name in DETECTORS.keys() - set(expected):
        refused(f"detector '{name}' needs", call=detect)(name, labels, **inputs)


LABELS, PROBS = np.arange(12) % 3, np.full((12, 3), 1 / 3)
FEATURES, HISTORY = np.random.default_rng(0).normal(size=(12, 4)), np.random.default_rng(1).normal(size=(5, 12))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("confident_lerning", {}, "unknown detector 'confident_lerning': did you mean 'confident_learning'"),
        ("knn", {"features": None}, "detector 'knn' needs features or neighbours"),
        ("confidence", {"probs": None}, "detector 'confidence' needs probs"),
        ("auxiliary", {"features": None}, "detector 'auxiliary' needs features"),
        ("forgetting", {"history": None}, "detector 'forgetting' needs history"),
        ("ensemble", {"probs": None, "features": None}, "detector 'ensemble' needs probs or features"),
        ("ensemble", {"probs": PROBS[:-1]}, "probs has 11 rows for 12 labels"),
        ("knn", {"features": FEATURES[:5]}, "features has 5 rows for 12 labels"),
        ("knn", {"neighbours": np.zeros((2, 9, 20), int)}, "neighbours has 9 rows for 12 labels"),
        ("knn", {"neighbours": np.zeros((2, 12, 5), int)}, "11 are needed"),
        ("forgetting", {"history": HISTORY[:, :5]}, "history has 5 rows for 12 labels"),
        ("knn", {"features": np.where(np.eye(12, 4), np.inf, FEATURES)}, "features holds values that are not finite"),
        ("confidence", {"labels": LABELS + 1}, "labels run from 1 to 3"),
        ("knn", {"labels": LABELS - 1, "probs": None}, "labels run from -1 to 1"),
        ("knn", {"labels": LABELS / 2}, "labels are float64"),
        ("confidence", {"labels": LABELS * 0, "probs": PROBS[:, :1]}, "1 classes"),
    ],
)
def test_wrong_input_is_named(name, changes, message):
    refused(message, call=detect)(
        name, **{"labels": LABELS, "probs": PROBS, "features": FEATURES, "history": HISTORY} | changes
    )


def test_probabilities_may_be_whole_numbers():
    assert_same(
        detect("disagreement", LABELS, np.eye(3, dtype=int)[LABELS]), detect("disagreement", LABELS, np.eye(3)[LABELS])
    )


def test_what_a_detector_does_not_read_need_not_fit():
    expected = detect("knn", LABELS, features=FEATURES)
    assert_same(detect("knn", LABELS, PROBS[:, 0], FEATURES, HISTORY[:, :3]), expected)


@every_detector
def test_the_fewest_rows_and_labels_of_one_class_give_finite_scores(name):
    fewest = FEWEST_ROWS.get(name, 2)
    for n, labels in ((fewest, LABELS), (12, LABELS * 0)):
        suspects = detect(name, labels[:n], PROBS[:n], FEATURES[:n], HISTORY[:, :n])
        assert np.isfinite(suspects.score).all() and len(suspects.score) == n
        assert (suspects.suggested != labels[:n])[suspects.flagged].all()
    assert name in usable(INPUTS, fewest) and name not in usable(INPUTS, fewest - 1)
    n = fewest - 1
    refused(f"'{name}' needs at least {fewest} rows", call=detect)(
        name, LABELS[:n], PROBS[:n], FEATURES[:n], HISTORY[:, :n]
    )
