"""Batched augmentations that run where the batch lies; every image gets its own draw.

Crop, flip and blur are linear along each image axis, so each image needs one small matrix an axis; brightness,
contrast, saturation, hue and grey are affine in its colours, so each image needs one small colour matrix.
`draw` makes the random numbers, `apply` is arithmetic only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from ptglab.errors import InputError, one_of

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as in Pillow and torchvision
YIQ = np.array([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])  # FCC NTSC
# colour to its chroma, the part without luma; and to that chroma a quarter turn on, as matrices
CHROMA = (np.eye(3) - np.array(GREY)).tolist()
TURNED = (np.linalg.inv(YIQ) @ [[0, 0, 0], [0, 0, -1], [0, 1, 0]] @ YIQ).tolist()


@dataclass(frozen=True)
class Recipe:
    """How strongly one view is changed. Probabilities are per image; `jitter` values are half-widths."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area that is kept
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift: int = 0  # most whole pixels by which the crop lies beside the image, which is black there
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # of a full turn
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_radius: int = 0  # pixels on each side of a blur's centre; 0: a twentieth of the image's side
    solarize: float = 0.0


# SimCLR (Chen et al. 2020, appendix A), Barlow Twins (Zbontar et al. 2021, section 3.1: the asymmetric views of
# BYOL) and VICReg, with the strengths solo-learn uses on CIFAR; for the others see pretrain.SCHEDULES.
_SIMCLR = Recipe(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
_BARLOW = Recipe(blur=0.0)
_PAPER = replace(_SIMCLR, crop_scale=(0.2, 1.0), blur=1.0, blur_radius=1)
_DKOBAK = Recipe(crop_scale=(0.2, 1.0), saturation=0.4, grey=0.1, blur=0.0)
_EMP = Recipe((0.25, 0.25), (1.0, 1.0), saturation=0.4, hue=0.2, blur=0.1, solarize=0.1)
_WEAK = Recipe(crop_scale=(0.6, 1.0), jitter=0.0, grey=0.0, blur=0.0)
_GREY = Recipe(crop_scale=(0.4, 1.0), brightness=0.4, contrast=0.4, hue=0.0, grey=0.0, blur=0.3)
_DIGITS = replace(_GREY, flip=0.0)
PRESETS: dict[str, tuple[Recipe, Recipe]] = {
    "simclr": (_SIMCLR, _SIMCLR),
    "barlow_twins": (_BARLOW, replace(_BARLOW, solarize=0.2)),
    "vicreg": (replace(_BARLOW, crop_scale=(0.2, 1.0)), replace(_BARLOW, crop_scale=(0.2, 1.0), solarize=0.1)),
    "paper": (_PAPER, _PAPER),
    "dkobak": (_DKOBAK, _DKOBAK),
    "emp_ssl": (_EMP, _EMP),
    "grey": (_GREY, _GREY),
    "digits": (_DIGITS, _DIGITS),
    "weak": (_WEAK, _WEAK),
    "weak_shift": (replace(_WEAK, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), shift=4),) * 2,
    "weak_digits": (replace(_WEAK, crop_scale=(0.7, 1.0), flip=0.0),) * 2,
}
for _name in [*PRESETS]:  # for images whose classes a mirror would confuse
    PRESETS[f"{_name}_unflipped"] = tuple(replace(recipe, flip=0.0) for recipe in PRESETS[_name])
MIRROR_SENSITIVE = {"digits", "svhn"}  # data whose classes a flip would confuse


def for_dataset(name: str, dataset: str) -> str:
    """Return the variant of preset `name` for `dataset`: without flips and hue where classes are mirror-sensitive.

    Raises InputError for an unknown name.
    """
    preset(name)
    if dataset not in MIRROR_SENSITIVE:
        return name
    return "weak_digits" if name.startswith("weak") else "digits"


def preset(name: str | tuple[Recipe, Recipe]) -> tuple[Recipe, Recipe]:
    """Return the recipes of the first and second view, or those given. Raises InputError for an unknown name."""
    return PRESETS[one_of("augmentation", name, PRESETS)] if isinstance(name, str) else name


def adjusted(name: str, jitter: float, crop: float) -> tuple[Recipe, ...]:
    """Return preset `name` with another half-width of brightness, `jitter`, and another least area kept, `crop`.

    Other colours change in proportion; 0 leaves either as it is. Raises InputError for what is not between 0 and 1.
    """
    if not (0 <= jitter <= 1 and 0 <= crop <= 1):
        raise InputError(f"jitter is {jitter}, crop {crop}; both must lie between 0 and 1")
    found = []
    for each in preset(name):
        times, least = jitter / each.brightness if jitter else 1, crop or each.crop_scale[0]
        colours = {key: min(1, times * getattr(each, key)) for key in ("brightness", "contrast", "saturation")}
        hue, crops = min(0.5, times * each.hue), (least, max(least, each.crop_scale[1]))
        found.append(replace(each, **colours, hue=hue, crop_scale=crops))
    return tuple(found)


def draw(recipe: Recipe, shape: tuple[int, ...], rng: torch.Generator) -> dict[str, Tensor | int | None]:
    """Draw what happens to each of B images: every value a float32 or bool tensor [B], on the generator's device.

    shape: [B, C, H, W]. `top`, `left`, `height`, `width` are the crop in pixels; `*_factor` as in torchvision's
    `adjust_*`; `hue_turn` in turns; `sigma` in pixels, 0 for no blur. `sigma` and `solarize` are None where the
    recipe never blurs or solarizes; `radius` of the blur is a number, the same for all.
    """
    b, _, h, w = shape

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(b, generator=rng, device=rng.device)

    def factor(half_width: float) -> Tensor:
        return 1 + jittered * uniform(-half_width, half_width)

    def shifted() -> Tensor | int:
        return uniform(-recipe.shift - 0.5, recipe.shift + 0.5).round() if recipe.shift else 0

    area = uniform(*recipe.crop_scale) * h * w
    ratio = uniform(*map(math.log, recipe.crop_ratio)).exp()
    height = (area / ratio).sqrt().clamp(max=h)
    width = (area * ratio).sqrt().clamp(max=w)
    jittered = (uniform() < recipe.jitter).float()
    return dict(
        height=height,
        width=width,
        top=uniform() * (h - height) + shifted(),
        left=uniform() * (w - width) + shifted(),
        flip=uniform() < recipe.flip,
        brightness_factor=factor(recipe.brightness),
        contrast_factor=factor(recipe.contrast),
        saturation_factor=factor(recipe.saturation),
        hue_turn=jittered * uniform(-recipe.hue, recipe.hue),
        grey=uniform() < recipe.grey,
        sigma=(uniform() < recipe.blur) * uniform(*recipe.blur_sigma) if recipe.blur else None,
        radius=recipe.blur_radius,
        solarize=uniform() < recipe.solarize if recipe.solarize else None,
    )


def apply(x: Tensor, drawn: dict[str, Tensor | int | None], size: int | None = None) -> Tensor:
    """Return x [B, C, H, W] in [0, 1], changed as drawn: crop, flip, blur; then colours; then solarize.

    Rows and columns keep their number, or the longer of them becomes `size`. The result is channels-last: columns,
    then colours, then rows are matrix products on the memory layout as it is, with one copy in between.
    """
    b, c, h, w = x.shape
    scale = (size or max(h, w)) / max(h, w)
    rows = _resampling(h, round(scale * h), drawn["top"], drawn["height"])  # [B, H', H]
    columns = _resampling(w, round(scale * w), drawn["left"], drawn["width"])  # [B, W', W]
    columns = torch.where(drawn["flip"][:, None, None], columns.flip(1), columns)
    if drawn["sigma"] is not None:
        rows, columns = (_blurring(m.shape[1], scale * drawn["sigma"], drawn["radius"]) @ m for m in (rows, columns))
    x = torch.bmm(x.reshape(b, c * h, w), columns.mT).view(b, c, h, columns.shape[1])
    matrix, offset = _colours((x.mean(3) * rows.mean(1)[:, None]).sum(2), drawn)
    x = torch.bmm(matrix, x.flatten(2)).view(b, c, h, columns.shape[1])
    x = torch.bmm(rows, x.permute(0, 2, 3, 1).reshape(b, h, columns.shape[1] * c))
    x = x.add_(offset[:, None, None]).clamp_(0, 1)
    x = x.view(b, rows.shape[1], columns.shape[1], c).permute(0, 3, 1, 2)
    if drawn["solarize"] is not None:
        x = torch.where(drawn["solarize"][:, None, None, None] & (x >= 0.5), 1 - x, x)
    return x


Part = tuple[slice, int]  # (rows, total): images that are those rows of a batch of `total`


def two_views(
    images: Tensor, name: str, rng: torch.Generator, size: int | None = None,
    change: Callable[..., Tensor] = apply, part: Part | None = None, number: int = 2,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return two independently augmented float32 copies in [0, 1] of uint8 `images` [B, C, H, W], channels-last.

    Another `number` of them takes turns with the two recipes. With `size` the longer side of the views has that many
    pixels; `change` may be a compiled `apply`. The images of a `part` change as they would in the whole batch, for all
    of which numbers are drawn.
    """
    x, (rows, total) = images.float().mul_(1 / 255), part or (slice(None), len(images))
    views = []
    for recipe in islice(cycle(preset(name)), number):
        drawn = draw(recipe, (total, *x.shape[1:]), rng)
        own = {key: values[rows] if isinstance(values, Tensor) else values for key, values in drawn.items()}
        views.append(change(x, own, size))
    return tuple(views)


def _resampling(n: int, m: int, start: Tensor, length: Tensor) -> Tensor:
    """Return [B, m, n]: row i holds the bilinear weights of output pixel i of a crop of n pixels stretched to m."""
    centre = torch.arange(m, device=start.device) + 0.5
    source = start[:, None] + centre * length[:, None] / m - 0.5  # [B, m] in input pixels
    source = torch.where((source > -1) & (source < n), source.clamp(0, n - 1), source)  # black beside the image
    distance = (source[:, :, None] - torch.arange(n, device=start.device)).abs_()
    return distance.neg_().add_(1).clamp_(min=0)


def _blurring(n: int, sigma: Tensor, radius: int) -> Tensor:
    """Return [B, n, n]: a Gaussian cut at `radius` or n/20 pixels, edges reflected; the identity where sigma is 0."""
    radius = radius or max(1, round(n / 20))
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)  # [B, taps]
    weights = weights / weights.sum(1, keepdim=True)
    pixels = torch.arange(n, device=sigma.device)
    source = pixels[:, None] + taps  # [n, taps]
    source = (n - 1) - (source.abs() - (n - 1)).abs()  # reflect at both ends
    shifts = (source.mT[:, :, None] == pixels).float()  # [taps, n, n]
    return (weights @ shifts.flatten(1)).view(len(sigma), n, n)


def _colours(mean: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return each image's colour matrix [B, C, C] and the offset [B] added to all its channels.

    mean: [B, C], the image's mean colour, which contrast needs. The order is brightness, contrast, saturation,
    hue, grey; values are clamped once, at the end. Saturation scales the chroma, grey drops it, and hue turns it in
    the plane of YIQ, which is linear (HSV is not); none of them changes the luma.
    """
    brightness, contrast = drawn["brightness_factor"], drawn["contrast_factor"]
    gain, towards = brightness * contrast, (1 - contrast) * brightness  # contrast moves towards the mean luma
    if mean.shape[1] != 3:
        return gain[:, None, None] * torch.eye(mean.shape[1], device=mean.device), towards * mean.mean(1)
    strength = torch.where(drawn["grey"], 0, gain * drawn["saturation_factor"])
    angle = 2 * math.pi * drawn["hue_turn"]
    along, across = strength * angle.cos(), strength * angle.sin()
    # from numbers of Python's, since a table of constants would be copied to a GPU in every step
    entries = [gain * GREY[j] + along * CHROMA[i][j] + across * TURNED[i][j] for i in range(3) for j in range(3)]
    level = sum(mean[:, j] * GREY[j] for j in range(3))
    return torch.stack(entries, 1).view(-1, 3, 3), towards * level
