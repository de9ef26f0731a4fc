"""The comparisons are fair: the same work, in turn, the same result; and the figures drawn from them are right."""

import time
import warnings

import numpy as np
import peers
import pytest
import speed
import torch
from torch import nn

from ptglab.train import backbones, engine


@pytest.mark.parametrize("name", speed.COMPARISONS)
def test_ours_and_the_peer_agree(name):
    """At the smallest size, once: both run, in turn, and what they return differs by no more than is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        comparison = speed.COMPARISONS[name].build(0.001)
        measured = speed.measure(comparison, rounds=1)
    assert 0 <= measured["difference"] <= max(comparison.allowed, 0.01 * (name == "linear_heads"))
    assert measured["ratio"] == pytest.approx(measured["peer"] / measured["ours"])
    assert min(measured["ours"], measured["peer"]) > 0


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


def test_medians_and_the_range_of_the_ratio():
    found = speed.summary([1.0, 2.0, 4.0], [10.0, 10.0, 12.0])
    assert found == {"ours": 2, "peer": 10, "ratio": 5, "lowest_ratio": 3, "highest_ratio": 10}


def test_rounds_are_in_turn_after_one_unmeasured():
    called = []

    def take(name: str, seconds: float):
        return lambda: called.append(name) or time.sleep(seconds)

    measured = speed.measure(speed.Comparison("sleep", take("ours", 0.01), take("peer", 0.03)), rounds=2)
    assert called == ["ours", "peer"] * 3
    assert measured["ratio"] == pytest.approx(3, rel=0.4)


@pytest.mark.parametrize("e", [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(e):
    sizes = np.array([2000, 6000, 20000])
    assert speed.exponent(sizes, 3e-4 * sizes**e) == pytest.approx(e)


@pytest.mark.parametrize("name", speed.COSTS)
def test_costs_grow_with_their_size(name):
    """The same function at two sizes; what is timed is the work, not the making of its input."""
    small, large = {"confident learning": (256, 200_000), "SSL epoch against image size": (8, 24)}.get(
        name, (256, 1500)
    )
    (first, few), (second, many) = speed.cost(name, (small, large))
    assert (first, second) == (small, large)
    assert 0 < few < many


def test_flops_of_a_network_counted_by_hand():
    """The stem and a linear map: forward, and backward once for the weights and, past the stem, once for the input."""

    class Small(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).mean((2, 3)))

    stem = 2 * 5 * 3 * 9 * 8 * 8  # 3 to 5 channels, 3 x 3, on 8 x 8 pixels
    assert speed.flops(Small(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Linear(5, 7)), 8) == 2 * stem + 3 * 2 * 5 * 7
    resnet = backbones.build("resnet18", 16, peers.random_images(2), 0)
    assert speed.flops(resnet, 32) == pytest.approx(3 * 2 * 0.556e9 / 16, rel=0.03)  # 0.556 GMAC at a width of 64


def test_peak_is_a_rate_no_product_exceeds():
    place = engine.place("cpu")
    rate = speed.peak(place, 512, 16)
    a = torch.rand(512, 512)
    assert 1e8 < rate < 1e14
    assert 2 * 512**3 / speed.timed(lambda: [a @ a for _ in range(10)]) * 10 < 1.5 * rate
