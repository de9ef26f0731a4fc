"""Batched augmentations against torchvision, image by image, and against loops over pixels."""

import cmath
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from scipy.stats import binom, kstest

from ptglab.errors import InputError
from ptglab.train import augment, engine

SIZES = [(3, 16, 16), (1, 16, 16), (3, 32, 36), (3, 12, 20), (1, 21, 9), (3, 64, 40)]
COLOURED = augment.Recipe(solarize=0.3)  # everything happens


def rand(*shape: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def uint8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def nothing(shape, **changes) -> dict:
    """Draws that change nothing, but for `changes`: one number for all images, or one each."""
    b, _, h, w = shape
    draws = dict(top=0.0, left=0.0, height=float(h), width=float(w), flip=False, grey=False, hue_turn=0.0, sigma=0.0,
                 brightness_factor=1.0, contrast_factor=1.0, saturation_factor=1.0, solarize=False)  # fmt: skip
    return {"radius": 0} | {k: torch.as_tensor(v).expand(b) for k, v in (draws | changes).items()}


def slow(image: np.ndarray, draws: dict) -> np.ndarray:
    """One image [C, H, W] in float64, pixel by pixel, one operation after the other; `draws` are plain numbers."""
    c, h, w = image.shape

    def pixel(y: float, x: float) -> np.ndarray:  # bilinear; its edge goes on for less than a pixel, then it is black
        if not (-1 < y < h and -1 < x < w):
            return np.zeros(c)
        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
        y0, x0 = math.floor(y), math.floor(x)
        y1, x1, fy, fx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), y - y0, x - x0
        upper = (1 - fx) * image[:, y0, x0] + fx * image[:, y0, x1]
        return (1 - fy) * upper + fy * ((1 - fx) * image[:, y1, x0] + fx * image[:, y1, x1])

    out = np.zeros((c, h, w))
    for i in range(h):
        for j in range(w):
            y = draws["top"] + (i + 0.5) * draws["height"] / h - 0.5
            x = draws["left"] + (j + 0.5) * draws["width"] / w - 0.5
            out[:, i, w - 1 - j if draws["flip"] else j] = pixel(y, x)
    if draws["sigma"]:
        ry, rx = (draws["radius"] or max(1, round(n / 20)) for n in (h, w))
        padded = np.pad(out, ((0, 0), (ry, ry), (rx, rx)), mode="reflect")
        weights = [
            [math.exp(-(dy**2 + dx**2) / (2 * draws["sigma"] ** 2)) for dx in range(-rx, rx + 1)]
            for dy in range(-ry, ry + 1)
        ]
        weights = np.array(weights) / np.sum(weights)
        for i in range(h):
            for j in range(w):
                window = padded[:, i : i + 2 * ry + 1, j : j + 2 * rx + 1]
                out[:, i, j] = (window * weights).sum((1, 2))

    def luma(p) -> float:
        return 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2] if c == 3 else p[0]

    out *= draws["brightness_factor"]
    level = np.mean([luma(out[:, i, j]) for i in range(h) for j in range(w)])
    out = draws["contrast_factor"] * out + (1 - draws["contrast_factor"]) * level
    for i in range(h):
        for j in range(w):
            p = out[:, i, j]
            if c == 3:
                p = draws["saturation_factor"] * p + (1 - draws["saturation_factor"]) * luma(p)
                chroma = 0.5959 * p[0] - 0.2746 * p[1] - 0.3213 * p[2]
                chroma += 1j * (0.2115 * p[0] - 0.5227 * p[1] + 0.3112 * p[2])
                turned = chroma * cmath.exp(2j * math.pi * draws["hue_turn"])
                yiq = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
                p = np.linalg.solve(yiq, [luma(p), turned.real, turned.imag])
                p = np.full(3, luma(p)) if draws["grey"] else p
            p = np.clip(p, 0, 1)
            out[:, i, j] = np.where(p >= 0.5, 1 - p, p) if draws["solarize"] else p
    return out


@pytest.mark.parametrize("recipe", [COLOURED, replace(COLOURED, blur_radius=2, crop_scale=(1.0, 1.0), shift=4)])
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 12, 12), (3, 8, 14), (1, 25, 10)])
def test_everything_is_the_slow_reference(shape, recipe):
    x = rand(8, *shape)
    draws = augment.draw(recipe, x.shape, torch.Generator().manual_seed(1))
    fast = augment.apply(x, draws)
    for i in range(len(x)):
        expected = slow(x[i].double().numpy(), {k: v if k == "radius" else v[i].item() for k, v in draws.items()})
        np.testing.assert_allclose(fast[i].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("box", [(0, 0, 16, 20), (3, 5, 9, 11), (0, 2, 16, 10), (10, 0, 6, 20), (7, 9, 2, 2)])
def test_crop_is_torchvisions(box):
    """Whole pixels; where torchvision repeats the edge of the crop, ours sees the pixel beyond it."""
    top, left, height, width = box
    x = rand(2, 3, 16, 20)
    fast = augment.apply(
        x, nothing(x.shape, top=float(top), left=float(left), height=float(height), width=float(width))
    )
    peer = tv.resized_crop(x, top, left, height, width, [16, 20], antialias=False)

    def inside(n: int, start: int, length: int) -> torch.Tensor:
        source = (torch.arange(n) + 0.5) * length / n - 0.5
        at_edge = (source < 0) & (start > 0) | (source > length - 1) & (start + length < n)
        return ~at_edge

    mask = inside(16, top, height)[:, None] & inside(20, left, width)
    assert mask.float().mean() > 0.2
    torch.testing.assert_close(fast[..., mask], peer[..., mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SIZES)
def test_blur_is_torchvisions(shape):
    x = rand(8, *shape)
    sigma = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8, 1.2, 1.6, 2.0])
    kernel = [2 * max(1, round(n / 20)) + 1 for n in (shape[2], shape[1])]
    fast = augment.apply(x, nothing(x.shape, sigma=sigma))
    torch.testing.assert_close(fast[0], x[0], atol=1e-6, rtol=0)
    for i in range(1, len(x)):
        expected = tv.gaussian_blur(x[i], kernel, [sigma[i].item()] * 2)
        torch.testing.assert_close(fast[i], expected, atol=1e-5, rtol=0)


FACTORS = torch.tensor([0.6, 0.8, 0.95, 1.0, 1.1, 1.25])


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(
    "name, adjust",
    [
        ("brightness_factor", tv.adjust_brightness),
        ("contrast_factor", tv.adjust_contrast),
        ("saturation_factor", tv.adjust_saturation),
    ],
)
def test_colour_is_torchvisions(name, adjust, c):
    """Mid-range images, which nothing clamps; torchvision's luma weighs red 0.2989, ours 0.299."""
    x = rand(6, c, 16, 16, low=0.3, high=0.7)
    fast = augment.apply(x, nothing(x.shape, **{name: FACTORS}))
    for i, factor in enumerate(FACTORS.tolist()):
        torch.testing.assert_close(fast[i], adjust(x[i], factor), atol=1e-4, rtol=0)


def test_solarize_is_torchvisions():
    x = rand(4, 3, 16, 16)
    fast = augment.apply(x, nothing(x.shape, solarize=torch.tensor([True, False, True, False])))
    for i in range(4):
        expected = tv.solarize(x[i], 0.5) if i % 2 == 0 else x[i]
        torch.testing.assert_close(fast[i], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", augment.PRESETS)
def test_views_are_finite_images(name, shape):
    images = uint8(24, *shape)
    first, second = augment.two_views(images, name, torch.Generator().manual_seed(0))
    for view in (first, second):
        assert view.shape == images.shape and view.dtype == torch.float32
        assert view.isfinite().all() and view.min() >= 0 and view.max() <= 1
        assert view.std((1, 2, 3)).max() > 0.05  # still an image
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert (first - second).abs().amax((1, 2, 3)).min() > 0.01  # every image has two different views


@pytest.mark.parametrize("name", augment.PRESETS)
def test_views_depend_on_the_generator_alone(name):
    images = uint8(8, 3, 16, 16)

    def views(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 10 * len(seen))  # the global state changes every time
        seen.append(torch.stack(augment.two_views(images, name, torch.Generator().manual_seed(seed))))
        return seen[-1]

    seen = []
    assert torch.equal(views(0), views(0))
    assert not torch.equal(views(1), seen[0])
    assert torch.equal(seen[0][0], *augment.two_views(images, name, torch.Generator().manual_seed(0), number=1))


# image, longer side asked for, height and width to be had
SMALLER = [((3, 32, 36), 27, (24, 27)), ((1, 8, 8), 6, (6, 6)), ((3, 64, 40), 48, (48, 30)), ((1, 21, 9), 10, (10, 4))]


@pytest.mark.parametrize("shape, size, sides", [*SMALLER, ((3, 12, 20), 30, (18, 30))])
def test_another_size_is_bilinear_interpolation(shape, size, sides):
    x = rand(4, *shape)
    flip = torch.tensor([False, True] * 2)
    expected = F.interpolate(x, sides, mode="bilinear", align_corners=False, antialias=False)
    fast = augment.apply(x, nothing(x.shape, flip=flip), size)
    torch.testing.assert_close(fast[0::2], expected[0::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(fast[1::2], expected[1::2].flip(3), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs g++")
def test_compiled_is_plain():
    """With and without solarizing and another size; what it returns lies in memory as before."""
    torch._dynamo.reset()
    change = engine.place("cpu", compile_from=0).compiled(augment.apply, 1)
    x = rand(8, 3, 16, 12)
    for recipe, size in ((augment.Recipe(), None), (COLOURED, 12)):
        draws = augment.draw(recipe, x.shape, torch.Generator().manual_seed(0))
        changed, expected = change(x, draws, size), augment.apply(x, draws, size)
        torch.testing.assert_close(changed, expected, atol=2e-6, rtol=0)
        assert changed.stride() == expected.stride()
    torch._dynamo.reset()


MANY = 20_000


def many(recipe: augment.Recipe, h: int = 32, w: int = 32) -> dict:
    return augment.draw(recipe, (MANY, 3, h, w), torch.Generator().manual_seed(0))


def share_is(drawn: torch.Tensor, p: float) -> bool:
    """Whether a share is within the central 99.9 % of a binomial."""
    low, high = binom.ppf([0.0005, 0.9995], MANY, p)
    return low <= drawn.sum().item() <= high


@pytest.mark.parametrize("name", augment.PRESETS)
@pytest.mark.parametrize("view", [0, 1])
def test_draws_have_the_recipes_distribution(name, view):
    recipe = augment.preset(name)[view]
    draws = many(recipe)
    area = draws["height"] * draws["width"] / 32**2
    ratio = draws["width"] / draws["height"]
    low, high = recipe.crop_scale
    assert low - 1e-5 <= area.min() and area.max() <= high + 1e-5
    assert recipe.crop_ratio[0] - 1e-5 <= ratio.min() and ratio.max() <= recipe.crop_ratio[1] + 1e-5
    small = area[area < 0.7]  # no crop of that area is cut, whatever its ratio
    if len(small) > 100 and low < high:
        assert kstest(small, "uniform", (low, 0.7 - low)).pvalue > 1e-4
        assert kstest(ratio[area < 0.7].log(), "uniform", (math.log(3 / 4), 2 * math.log(4 / 3))).pvalue > 1e-4
    if low < high:
        assert share_is(area < 0.7, (0.7 - low) / (high - low)) if low < 0.7 else area.min() >= 0.7 - 1e-5
    for start, length in (("top", "height"), ("left", "width")):
        room, shift = 32 - draws[length], recipe.shift
        assert draws[start].min() >= -shift - 1e-4 and (draws[start] - room).max() <= shift + 1e-4
        if shift:  # whole pixels, each as often; the crop is the whole image
            assert all(share_is(draws[start] == each, 1 / (2 * shift + 1)) for each in range(-shift, shift + 1))
        else:
            assert kstest((draws[start] / room)[room > 0.1], "uniform").pvalue > 1e-4
    assert share_is(draws["flip"], recipe.flip) and share_is(draws["grey"], recipe.grey)
    for key, width in (
        ("brightness", recipe.brightness),
        ("contrast", recipe.contrast),
        ("saturation", recipe.saturation),
    ):
        change = draws[f"{key}_factor"] - 1
        assert share_is(change != 0, recipe.jitter)
        if recipe.jitter:
            assert kstest(change[change != 0], "uniform", (-width, 2 * width)).pvalue > 1e-4
    if recipe.jitter and recipe.hue:
        turned = draws["hue_turn"][draws["hue_turn"] != 0]
        assert share_is(draws["hue_turn"] != 0, recipe.jitter)
        assert kstest(turned, "uniform", (-recipe.hue, 2 * recipe.hue)).pvalue > 1e-4
    else:
        assert not draws["hue_turn"].any()
    assert (draws["sigma"] is None) == (recipe.blur == 0) and (draws["solarize"] is None) == (recipe.solarize == 0)
    if recipe.blur:
        assert share_is(draws["sigma"] > 0, recipe.blur)
        assert kstest(draws["sigma"][draws["sigma"] > 0], "uniform", (0.1, 1.9)).pvalue > 1e-4
    if recipe.solarize:
        assert share_is(draws["solarize"], recipe.solarize)


@pytest.mark.parametrize("dataset", ["digits", "svhn", "cifar10", "a/folder"])
@pytest.mark.parametrize("name", augment.PRESETS)
def test_suited_never_flips_what_a_flip_confuses(name, dataset):
    chosen = augment.for_dataset(name, dataset)
    assert augment.for_dataset(chosen, dataset) == chosen
    if dataset in ("digits", "svhn"):
        assert all(r.flip == 0 and (r.hue == 0 or r.jitter == 0) for r in augment.preset(chosen))
        assert chosen.startswith("weak") == name.startswith("weak")  # as gentle as what was asked for
    else:
        assert chosen == name


@pytest.mark.parametrize("ask", [augment.preset, lambda name: augment.for_dataset(name, "digits")])
def test_unknown_preset_names_the_nearest(ask):
    with pytest.raises(InputError, match="unknown augmentation 'simclrr': did you mean 'simclr'"):
        ask("simclrr")
    with pytest.raises(InputError, match="did you mean 'weak'"):
        augment.two_views(uint8(2, 1, 8, 8), "week", torch.Generator())


def test_second_view_has_the_second_recipe(monkeypatch):
    """Of two recipes that do nothing, only the second solarizes."""
    still = augment.Recipe(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, jitter=0, grey=0, blur=0)
    monkeypatch.setitem(augment.PRESETS, "test", (still, augment.Recipe(**asdict(still) | {"solarize": 1.0})))
    images = uint8(4, 3, 16, 16)
    first, second = augment.two_views(images, "test", torch.Generator().manual_seed(0))
    torch.testing.assert_close(first, images / 255, atol=1e-6, rtol=0)
    torch.testing.assert_close(second, tv.solarize(images, 128) / 255, atol=1e-6, rtol=0)
