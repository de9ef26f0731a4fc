"""Exponents, extrapolation and what breaks first, on measurements that are made up and follow known laws."""

import numpy as np
import pandas as pd
import pytest
import scale
from expected import refused

POWERS = {"cache of pixels": 1.0, "load again": 0.5, "features": 1.0, "linear heads": 1.1, "neighbours": 1.4,
          "confidence": 1.0, "disagreement": 1.0, "confident_learning": 1.0, "knn": 1.0,
          "tables and gallery": 0.9}  # fmt: skip
GPU = pd.Series({"seconds_an_epoch": 1.0})


def measured(sizes=(10**4, 10**5, 10**6)) -> pd.DataFrame:
    """Each stage takes images^power / 1e4 CPU seconds and leaves 100 bytes an image; features of 20,000 at most."""
    rows = []
    for n in sizes:
        rows.append({"images": n, "stage": "shards", "measured": n, "bytes": 250 * n})
        for stage, power in POWERS.items():
            asked = min(n, 20_000) if stage == "features" else n
            rows.append({"images": n, "stage": stage, "measured": asked, "cpu_seconds": asked**power / 1e4,
                         "seconds": 1.0, "bytes": 100 * n, "peak": 2000 * n,
                         "precision": 0.9 if stage in ("confidence", "knn") else None})  # fmt: skip
    return pd.DataFrame(rows)


def test_exponents_are_those_of_the_laws():
    found = scale.exponents(measured())
    for stage in ("cache of pixels", "features", "linear heads", "neighbours"):
        assert found[stage] == pytest.approx(POWERS[stage])
    assert found["detection"] == pytest.approx(1) and not {"knn", "load again"} & {*found.index}
    table = scale.seconds(measured())
    assert table.loc[10**6, "features"] == pytest.approx(100)  # in proportion to those 20,000
    np.testing.assert_allclose(table[scale.ALL], table.drop(columns=scale.ALL).sum(axis=1))


def test_the_smaller_sizes_predict_the_largest_where_the_law_holds():
    found = scale.predicted(measured())
    np.testing.assert_allclose(found["ratio"].drop([scale.ALL, "loading and tables", "detection"]), 1)
    broken = measured()
    broken.loc[(broken["stage"] == "linear heads") & (broken["images"] == 10**6), "cpu_seconds"] *= 3
    assert scale.predicted(broken).loc["linear heads", "ratio"] == pytest.approx(3)


def test_costs_by_hand():
    """An epoch of 50,000 images takes a second; CPU stages are shared by the cores of all GPUs."""
    found = scale.cost(measured(), GPU, images=[10**8], gpus=[8]).set_index("stage")
    assert found.loc["pre-training", "hours"] == pytest.approx(200 * 1e8 / 50_000 / 8 / 3600)
    assert found.loc["features", "hours"] == pytest.approx(1e8 / 50_000 / 6 / 8 / 3600)
    assert found.loc["cache of pixels", "hours"] == pytest.approx(1e4 / (16 * 8) / 3600)
    assert found.loc["neighbours", "hours"] == pytest.approx((1e8**1.4) / 1e4 / (16 * 8) / 3600)
    assert found.loc["cache of pixels", "bytes"] == 1e10
    assert scale.ALL not in found.index


def test_what_breaks_first_by_hand():
    """2,000 bytes resident an image are 128 GB at 64 million; 1,100 bytes left an image are 4 TB at 3.6 billion."""
    frame = measured()
    costs = scale.cost(frame, GPU, images=[10**6, 10**8], gpus=[8, 1000])
    found = scale.breaks(frame, GPU, costs).set_index(["images", "gpus"])
    assert found.loc[(10**6, 8), "first"] == "nothing" and found.loc[(10**6, 8), "share"] < 1
    assert found.loc[(10**8, 8), "first"] == "memory" and found.loc[(10**8, 8), "also"] == ""
    assert found.loc[(10**8, 8), "share"] == pytest.approx(2000 * 1e8 / 128e9)
    assert found.loc[(10**8, 1000), "first"] == "batch" and found.loc[(10**8, 1000), "also"] == "memory"
    assert found.loc[(10**8, 1000), "share"] == pytest.approx(512 * 1000 / 32768)
    slow = scale.breaks(frame, GPU * 1e4, scale.cost(frame, GPU * 1e4, images=[10**8], gpus=[1]))
    assert (
        slow["first"][0] == "time of pre-training" and slow["also"][0] == "time of features, time of neighbours, memory"
    )


def test_pixels_are_read_faster_than_a_disk_can():
    """100 bytes every 20 microseconds on 8 GPUs are 40 MB a second; a hundred times faster GPUs need 4 GB."""
    frame, fast = measured(), GPU / 100
    costs = scale.cost(frame, fast, images=[10**9], gpus=[8])
    assert "reading" in scale.breaks(frame, fast, costs)["also"][0]
    assert "reading" not in scale.breaks(frame, GPU, scale.cost(frame, GPU, images=[10**9], gpus=[8]))["also"][0]


def test_every_stage_has_something_instead():
    costs = scale.cost(measured(), GPU)
    assert {f"time of {stage}" for stage in costs["stage"]} <= scale.INSTEAD.keys()
    assert len(costs) == 3 * 3 * 11 and len(scale.breaks(measured(), GPU, costs)) == 9


def test_measurements_that_are_not_there_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "FIGURES", tmp_path)
    refused("scale.csv", "checkout", call=scale.read)("scale")
    measured().to_csv(tmp_path / "scale.csv", index=False)
    assert len(scale.read("scale")) == 33
