"""Means over seeds, gains and grids, against figures worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from ptglab.data import noise
from ptglab.lab import spec, tables
from ptglab.train import controls


@pytest.fixture
def results() -> pd.DataFrame:
    """Two arms and a recipe under two rates and two seeds, two detectors each, and human labels of one seed."""
    rows = []
    accuracy = {("scratch", "full", "plain"): 0.5, ("simclr", "linear", "plain"): 0.7, ("simclr", "linear", "gce"): 0.8}
    for (init, mode, recipe), base in accuracy.items():
        for rate in (0.6, 0.2):
            for seed in (0, 1):
                for detector in ("knn", "confidence"):
                    rows.append({"dataset": "d", "n_train": 9, "backbone": "r", "init": init, "mode": mode,
                                 "loss": "cross_entropy", "recipe": recipe, "noise": "uniform", "noise_rate": rate,
                                 "effective_rate": rate, "seed": seed, "detector": detector, "labels": np.nan,
                                 "accuracy_last": base - rate / 10 + 0.02 * seed, "f1": rate})  # fmt: skip
    human = rows[0] | {"labels": "label_worse", "noise": "human", "noise_rate": np.nan, "effective_rate": 0.403}
    return pd.DataFrame([*rows, human, human | {"init": "simclr", "mode": "linear", "accuracy_last": 0.9}])


def test_arms_are_named_and_human_labels_are_a_kind_of_noise(results):
    frame = tables.arms(results)
    assert list(frame["arm"].unique()) == ["scratch", "simclr + linear", "simclr + linear, gce"]
    assert tables.settings(frame) == [("uniform", 0.2), ("uniform", 0.6), ("label_worse", 0.4)]


def test_over_seeds_gives_mean_deviation_and_n(results):
    rows = tables.experiments(tables.arms(results))
    found = tables.over_seeds(rows, "accuracy_last", ["arm", *tables.NOISE]).set_index(["arm", *tables.NOISE])
    mean, deviation, n = found.loc[("simclr + linear", "uniform", 0.2)]
    assert (round(mean, 12), round(deviation, 12), n) == (0.69, round(0.02 / 2**0.5, 12), 2)  # of the sample
    assert found.loc[("scratch", "label_worse", 0.4), "n"] == 1


def test_gains_are_over_scratch_of_the_same_noise_and_seed(results):
    rows = tables.experiments(tables.arms(results))
    shuffled = rows.sample(frac=1, random_state=0)
    pairs = tables.gains(shuffled, "accuracy_last")
    by_arm = pairs[pairs["noise"] == "uniform"].groupby("arm")["gain"]
    assert by_arm.mean().round(12).to_dict() == {"simclr + linear": 0.2, "simclr + linear, gce": 0.3}
    assert by_arm.std().max() < 1e-12  # the effect of the seed drops out
    assert "scratch" not in set(pairs["arm"])
    lonely = tables.gains(rows[(rows["arm"] != "scratch") | (rows["seed"] == 0)], "accuracy_last")
    assert set(lonely["seed"]) == {0}


def test_the_grid_has_a_row_an_arm_and_a_column_a_setting(results):
    rows, mean, texts, _ = tables.grid(tables.experiments(tables.arms(results)), "accuracy_last")
    assert rows == ["scratch", "simclr + linear", "simclr + linear, gce"] and mean.shape == (3, 3)
    assert np.isnan(mean[2, 2]) and texts[2, 2] == ""
    assert texts[0, 0] == "49.0 ± 1.4" and texts[1, 2] == "90.0"  # one seed


def test_lines_rise_with_the_rate(results):
    lines, found = tables.by_rate(tables.experiments(tables.arms(results)), "accuracy_last", "uniform")
    np.testing.assert_allclose(lines["scratch"], [[0.2, 0.6], [0.49, 0.45], [0.02 / 2**0.5] * 2])
    assert len(found) == 6 and set(found["measure"]) == {"accuracy_last"}


def test_published_figures_stand_beside_ours(results):
    both = tables.compare_published(tables.experiments(tables.arms(results)), "accuracy_last", spec.published(), "ours")
    own = both.loc[("ours", "d", "uniform", 0.6)]
    assert own["arm"] == "simclr + linear" and own["gain"] == pytest.approx(0.2)  # the best plain arm, not gce
    for source, expected in {"paper": (0.73, 0.828, 0.098), "summary": (0.712, 0.789, 0.077)}.items():
        theirs = both.loc[(source, "cifar10", "uniform", 0.4)]
        assert tuple(theirs[["scratch", "pre-trained", "gain"]]) == expected  # the better method, of the short schedule
    barlow_twins = both.loc[("paper", "cifar100", "uniform", 0.8)]
    assert barlow_twins["pre-trained"] == 0.309
    assert set(both.columns) == {"scratch", "pre-trained", "arm", "n", "gain"}


def test_published_figures_have_our_names_and_their_source():
    """The authors' tables, whose schedules are told apart, and the three settings of the summary, which are in none."""
    published = spec.published()
    paper, summary = (published[published["source"] == source] for source in ("paper", "summary"))
    assert set(paper["init"]) == {"scratch", "simclr", "barlow_twins", "imagenet"} and len(summary) == 6
    assert set(paper["noise"]) <= set(noise.KINDS) and set(summary["noise"]) <= set(noise.KINDS)
    keys = ["dataset", "noise", "noise_rate", "labels", "init", "recipe", "which"]
    assert not published.duplicated([*keys, "source"]).any()
    both = paper.merge(summary, on=["dataset", "noise", "noise_rate", "labels"], suffixes=("", "_summary"))
    assert not (both["accuracy"] == both["accuracy_summary"]).any()
    at = paper[(paper["dataset"] == "cifar10") & (paper["noise_rate"] == 0.6)].set_index(["init", "recipe", "which"])
    best, last = "best epoch on clean test images", "last epoch"
    assert at.loc[("simclr", "plain", best), ["f1", "balanced_accuracy"]].tolist() == [0.91, 0.88]
    assert at.loc[("simclr", "long", last), "accuracy"] == 0.474 < at.loc[("scratch", "long", last), "accuracy"]
    assert at.loc[("simclr", "pre-trained for 10 epochs", best), "epochs_pretrain"] == 10


def test_limits_hold_every_mean_and_deviation(results):
    found = tables.by_rate(tables.experiments(tables.arms(results)), "accuracy_last", "uniform")[1]
    low, high = tables.span([found, found])
    assert 40 < low < 44 - 1 + 1e-9 and high > 79 + 1
    assert tables.span([found[:0]]) == (0, 100)


def test_what_nobody_knows_is_said(results):
    unknown = results.tail(2).assign(labels="mini", effective_rate=np.nan)
    frame = tables.arms(pd.concat([results, unknown]))
    assert tables.settings(frame)[-1] == ("mini", -1)
    assert tables.heading("mini", -1) == "mini\nrate unknown" and tables.heading("label_worse", 0.4) == "worse\n40%"
    assert tables.grid(tables.experiments(frame), "accuracy_last")[1].shape == (3, 4)


@pytest.fixture
def parts() -> pd.DataFrame:
    """Experiments under two rates and two seeds: at 0.4 with controls and two methods, at 0.2 without a control."""
    accuracy = {
        ("scratch", "full"): (0.7, 0.74), ("random", "linear"): (0.9, 0.8), ("pixels", "linear"): (0.88, 0.9),
        ("simclr", "linear"): (0.95, 0.97), ("simclr", "full"): (0.99, 0.99), ("vicreg", "linear"): (0.96, 0.94),
        ("lite0", "linear"): (0.99, 0.99),
    }  # fmt: skip
    about = {"dataset": "d", "n_train": 9, "recipe": "plain", "noise": "uniform"}
    rows = [
        about | {"init": init, "mode": mode, "noise_rate": rate, "seed": seed, "a": value, "labels": np.nan,
                 "effective_rate": rate, "backbone": "r", "loss": "c"}
        for (init, mode), values in accuracy.items() for seed, value in enumerate(values) for rate in (0.2, 0.4)
        if rate == 0.4 or init not in controls.CONTROLS
    ]  # fmt: skip
    rows.append(rows[-1] | {"init": "simclr", "recipe": "gce", "a": 1.0})
    return tables.arms(pd.DataFrame(rows))


def test_the_gain_is_told_in_two_parts_by_hand(parts):
    """Pixels (.89 on average) are the best control, SimCLR with a linear head (.96) the best method; seed by seed."""
    [row] = tables.decompose(parts.sample(frac=1, random_state=0), "a").to_dict("records")
    assert (row["noise_rate"], row["control"], row["start"]) == (0.4, "pixels", "simclr")
    assert row["freezing"] == pytest.approx((0.18 + 0.16) / 2) and row["features"] == pytest.approx(0.07)
    assert "uniform 40%" in row["said"] and "17.0 ± 1.4" in row["said"] and "7.0 ± 0.0" in row["said"]
    gains = tables.gains(parts, "a").query("noise_rate == 0.4 and arm == 'simclr + linear'")["gain"]
    assert row["freezing"] + row["features"] == pytest.approx(gains.mean())


def test_parts_of_one_seed_have_no_deviation_and_lacking_arms_no_parts(parts):
    alone = tables.decompose(parts[parts["seed"] == 0], "a")
    assert alone["control"].tolist() == ["random"] and "±" not in alone["said"][0] and "n = 1" in alone["said"][0]
    for lacking in ("scratch", "simclr|vicreg", "random|pixels"):
        assert tables.decompose(parts[~parts["init"].str.fullmatch(lacking)], "a").empty
