"""Near-duplicates and outliers that were planted, and the definitions by hand."""

import math

import numpy as np
import pytest
import torch

from ptglab.detect import duplicates, neighbours


def photographs(n: int = 60, channels: int = 3, size: int = 24, seed: int = 0) -> torch.Tensor:
    """Return smooth images, uint8, no two alike."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=rng) * 255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)


def nearest(images: torch.Tensor) -> np.ndarray:
    return neighbours.nearest(images.flatten(1).numpy(), 10)[1]


def noisy(image: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(-6, 7, image.shape, generator=torch.Generator().manual_seed(1))
    return (image.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("rows", [1, 7, 4096])
@pytest.mark.parametrize("change", [torch.clone, noisy])
@pytest.mark.parametrize("channels", [1, 3])
def test_planted_twins_are_found_and_nothing_else(monkeypatch, change, channels, rows):
    """However many images are compared at a time; the difference is that of the definition."""
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", rows)
    images = photographs(channels=channels)
    images[41], images[7] = change(images[3]), change(images[50])
    pairs, difference = duplicates.duplicates(images, nearest(images))
    assert {tuple(pair) for pair in pairs} == {(3, 41), (7, 50)} and (np.diff(difference) >= 0).all()
    assert pairs.dtype == np.int64 and difference.dtype == np.float32
    for pair, found in zip(pairs, difference, strict=True):
        a, b = (torch.nn.functional.adaptive_avg_pool2d(images[i].float(), 16).flatten().numpy() for i in pair)
        contrast = (a.var(ddof=1) + b.var(ddof=1)) / 2
        assert found == pytest.approx(math.sqrt(((a - b) ** 2).mean() / contrast), rel=1e-4)


def test_pairs_are_those_of_comparing_all_pixels():
    """Images at every distance from each other, of which some are alike only when they are blurred."""
    rng = torch.Generator().manual_seed(2)
    base, mix = photographs(40), torch.linspace(0, 0.5, 40)[:, None, None, None]
    grain = torch.randint(0, 256, (40, 3, 24, 24), generator=rng)
    images = torch.cat([base, ((1 - mix) * base + mix * grain).to(torch.uint8)])
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 16).flatten(1).numpy().astype(np.float64)
    expected = set()
    for i, row in enumerate(nearest(images)):
        for j in row:
            contrast = (small[i].var(ddof=1) + small[j].var(ddof=1)) / 2
            if ((small[i] - small[j]) ** 2).mean() <= 0.15**2 * contrast:
                expected.add((min(i, j), max(i, j)))
    assert 5 < len(expected) < 35
    assert {tuple(pair) for pair in duplicates.duplicates(images, nearest(images))[0]} == expected


def test_three_of_a_kind_are_three_pairs_and_blank_images_are_twins():
    images = photographs(20)
    images[[4, 9, 15]] = images[4].clone()
    images[[0, 1]] = 128
    pairs, difference = duplicates.duplicates(images, nearest(images))
    assert {tuple(pair) for pair in pairs} == {(4, 9), (4, 15), (9, 15), (0, 1)} and (difference == 0).all()


def test_no_twins_is_no_error():
    images = photographs(15)
    pairs, difference = duplicates.duplicates(images, nearest(images))
    assert pairs.shape == (0, 2) and difference.shape == (0,)


def test_outliers_are_far_from_all():
    x = np.random.default_rng(0).normal(size=(300, 8)) + 10 * np.eye(8)[0]
    x[[5, 77]] = -10 * np.eye(8)[:2]
    score, flagged = duplicates.outliers(neighbours.nearest(x, 10)[0])
    assert list(np.flatnonzero(flagged)) == [5, 77] and set(np.argsort(score)[:2]) == {5, 77}


def test_outliers_by_hand():
    similarity = 1 - np.abs(np.random.default_rng(1).normal(size=(41, 5), scale=0.1)).astype(np.float32)
    similarity[7] = 0.1
    score, flagged = duplicates.outliers(similarity)
    far = np.log([1 - row.mean() for row in similarity])
    expected = 0.6745 * (far - np.median(far)) / np.median(np.abs(far - np.median(far))) > 3.5
    np.testing.assert_allclose(score, [row.mean() for row in similarity], rtol=1e-6)
    np.testing.assert_array_equal(flagged, expected)
    assert flagged[7]


def test_images_that_are_all_one_have_no_outliers():
    assert not duplicates.outliers(np.ones((20, 5), np.float32))[1].any()
