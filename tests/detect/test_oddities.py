import math

import numpy as np
import pytest
import torch

from ptglab.detect import duplicates as oddities
from ptglab.detect import neighbours


def photographs(n: int = 60, channels: int = 3, size: int = 24, seed: int = 0) -> torch.Tensor:
    """Smooth images, uint8, none like another."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=draws) * 255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)


def nearest(images: torch.Tensor) -> np.ndarray:
    return neighbours.nearest(images.flatten(1).numpy(), 10)[1]


def changed(image: torch.Tensor, how: str) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    noise = torch.randint(-6, 7, image.shape, generator=draws)
    return {"same": image, "noisy": (image.int() + noise).clamp(0, 255).to(torch.uint8)}[how]


@pytest.mark.parametrize("how", ["same", "noisy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_planted_twins_are_found_and_nothing_else(how, channels):
    images = photographs(channels=channels)
    images[41] = changed(images[3], how)
    images[7] = changed(images[50], how)
    pairs, difference = oddities.duplicates(images, nearest(images))
    assert {tuple(pair) for pair in pairs} == {(3, 41), (7, 50)}
    assert pairs.dtype == np.int64 and difference.dtype == np.float32
    assert (difference == 0).all() == (how == "same")


def test_difference_by_hand():
    images = photographs(12)
    images[5] = changed(images[2], "noisy")
    pairs, difference = oddities.duplicates(images, nearest(images))
    a, b = (torch.nn.functional.adaptive_avg_pool2d(images[i].float(), 16).flatten().numpy() for i in (2, 5))
    contrast = (a.var(ddof=1) + b.var(ddof=1)) / 2
    expected = math.sqrt(((a - b) ** 2).mean() / contrast)
    assert [tuple(p) for p in pairs] == [(2, 5)] and difference[0] == pytest.approx(expected, rel=1e-4)


def test_three_of_a_kind_are_three_pairs_and_blank_images_are_twins():
    images = photographs(20)
    images[[4, 9, 15]] = images[4].clone()
    images[[0, 1]] = 128
    pairs, _ = oddities.duplicates(images, nearest(images))
    assert {tuple(pair) for pair in pairs} == {(4, 9), (4, 15), (9, 15), (0, 1)}


def test_no_twins_is_no_error():
    images = photographs(15)
    pairs, difference = oddities.duplicates(images, nearest(images))
    assert pairs.shape == (0, 2) and difference.shape == (0,)


def test_outliers_are_far_from_all():
    draws = np.random.default_rng(0)
    x = draws.normal(size=(300, 8)) + 10 * np.eye(8)[0]
    x[[5, 77]] = -10 * np.eye(8)[:2]
    score, flagged = oddities.outliers(neighbours.nearest(x, 10)[0])
    assert list(np.flatnonzero(flagged)) == [5, 77] and set(np.argsort(score)[:2]) == {5, 77}


def test_outliers_by_hand():
    similarity = 1 - np.abs(np.random.default_rng(1).normal(size=(41, 5), scale=0.1)).astype(np.float32)
    similarity[7] = 0.1
    score, flagged = oddities.outliers(similarity)
    far = np.log([1 - row.mean() for row in similarity])
    middle = np.median(far)
    expected = 0.6745 * (far - middle) / np.median(np.abs(far - middle)) > 3.5
    np.testing.assert_allclose(score, [row.mean() for row in similarity], rtol=1e-6)
    np.testing.assert_array_equal(flagged, expected)
    assert flagged[7]


def test_images_that_are_all_one_have_no_outliers():
    assert not oddities.outliers(np.ones((20, 5), np.float32))[1].any()


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_images_are_compared_a_few_at_a_time(monkeypatch, rows):
    images = photographs()
    images[41] = changed(images[3], "noisy")
    expected = oddities.duplicates(images, nearest(images))
    monkeypatch.setattr(oddities, "BLOCK_ROWS", rows)
    for ours, theirs in zip(oddities.duplicates(images, nearest(images)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
