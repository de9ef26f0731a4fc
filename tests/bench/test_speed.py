"""The comparisons are fair: the same work, in turn, the same result; and cost is read correctly from a table."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scale
import speed

STAGES = {"cache of pixels": 1.0, "load again": 0.5, "features": 1.0, "neighbours": 1.4, "knn": 1.0,
          "tables and gallery": 0.9}  # fmt: skip


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if "lightly" in name else name for name in speed.COMPARISONS
])  # fmt: skip
def test_ours_and_the_peer_agree(name):
    """What the two return differs by no more than is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        comparison = speed.COMPARISONS[name].at(0.001)
        measured = speed.measure(comparison, rounds=1)
    assert 0 <= measured["difference"] <= max(comparison.allowed, 0.01 * name.startswith("linear_heads"))
    assert measured["ratio"] == pytest.approx(measured["peer"] / measured["ours"])


def test_a_wrong_result_shows():
    """One flag changed, one neighbour changed, one version's classes changed."""
    comparison = speed.confident_learning(500, 4)
    flags = comparison.ours()
    assert comparison.difference(flags, np.where(np.arange(500) == 7, ~flags, flags)) == 1
    comparison = speed.knn(300, 8)
    index = comparison.ours()
    assert comparison.difference(index, np.where(index == index[0, 0], -1, index)) > 0
    comparison = speed.linear_heads(300, 8, 3)
    probs = comparison.ours()
    assert comparison.difference(probs, np.roll(probs, 1, axis=2)) > 0.1


def test_rounds_are_in_turn_after_one_unmeasured():
    called = []
    comparison = speed.Comparison("", lambda: called.append("ours"), lambda: called.append("peer"))
    speed.measure(comparison, rounds=2)
    assert called == ["ours", "peer"] * 3
    found = speed.summary([1.0, 2.0, 4.0], [10.0, 10.0, 12.0])
    assert found == {"ours": 2, "peer": 10, "ratio": 5, "lowest_ratio": 3, "highest_ratio": 10}


def test_exponents_of_known_laws():
    """Stages that take images^power / 1e4 CPU seconds, features of a sample of the images."""
    rows = [(n, stage, min(n, 20_000) if stage == "features" else n) for n in (10**4, 10**5, 10**6) for stage in STAGES]
    frame = pd.DataFrame(rows, columns=["images", "stage", "measured"])
    frame["precision"] = np.where(frame["stage"] == "knn", 0.9, np.nan)
    frame["cpu_seconds"] = frame["measured"] ** frame["stage"].map(STAGES) / 1e4
    found = scale.exponents(frame)
    assert found[["cache of pixels", "features", "neighbours", "detection"]].tolist() == pytest.approx([1, 1, 1.4, 1])
    assert scale.curves(frame).loc[10**6, "features"] == pytest.approx(100)  # in proportion to those 20,000
