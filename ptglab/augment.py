"""Batched augmentations that run where the batch lies; every image gets its own draw.

Crop, flip and blur are linear along each image axis, so each image needs one small matrix an axis; brightness,
contrast, saturation, hue and grey are affine in its colours, so each image needs one small colour matrix.
`draw` makes the random numbers, `apply` is arithmetic only.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptglab.errors import one_of

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as in Pillow and torchvision


@dataclass(frozen=True)
class Recipe:
    """How strongly one view is changed. Probabilities are per image; `jitter` values are half-widths."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area that is kept
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # of a full turn
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


# SimCLR (Chen et al. 2020, appendix A), Barlow Twins (Zbontar et al. 2021, section 3.1: the asymmetric views of
# BYOL) and VICReg, with the strengths solo-learn uses on CIFAR.
_SIMCLR = Recipe(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
_BARLOW = Recipe(blur=0.0)
_DIGITS = Recipe(crop_scale=(0.4, 1.0), flip=0.0, brightness=0.4, contrast=0.4, hue=0.0, grey=0.0, blur=0.3)
PRESETS: dict[str, tuple[Recipe, Recipe]] = {
    "simclr": (_SIMCLR, _SIMCLR),
    "barlow_twins": (_BARLOW, replace(_BARLOW, solarize=0.2)),
    "vicreg": (
        replace(_BARLOW, crop_scale=(0.2, 1.0)),
        replace(_BARLOW, crop_scale=(0.2, 1.0), solarize=0.1),
    ),
    "digits": (_DIGITS, _DIGITS),
    "weak": (Recipe(crop_scale=(0.6, 1.0), jitter=0.0, grey=0.0, blur=0.0),) * 2,
    "weak_digits": (Recipe(crop_scale=(0.7, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0),) * 2,
}


MIRROR_SENSITIVE = {"digits", "svhn"}  # data whose classes a flip would confuse


def suited(name: str, dataset: str) -> str:
    """Return the variant of preset `name` for `dataset`: without flips and hue where classes are mirror-sensitive.

    Raises InputError for an unknown name.
    """
    preset(name)
    if dataset not in MIRROR_SENSITIVE:
        return name
    return "weak_digits" if name in ("weak", "weak_digits") else "digits"


def preset(name: str) -> tuple[Recipe, Recipe]:
    """Return the recipes of the first and second view. Raises InputError for an unknown name."""
    return PRESETS[one_of("augmentation", name, PRESETS)]


def two_views(images: Tensor, name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two independently augmented float32 copies in [0, 1] of uint8 `images` [B, C, H, W]."""
    x = images.float() / 255
    first, second = preset(name)
    return tuple(apply(x, draw(r, x.shape, generator)) for r in (first, second))


def weak(images: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Return one augmented float32 copy in [0, 1] of uint8 `images` [B, C, H, W], for supervised training."""
    x = images.float() / 255
    return apply(x, draw(preset(name)[0], x.shape, generator))


def draw(recipe: Recipe, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor | None]:
    """Draw what happens to each of B images: every value a float32 or bool tensor [B], on the generator's device.

    shape: [B, C, H, W]. `top`, `left`, `height`, `width` are the crop in pixels; `*_factor` as in torchvision's
    `adjust_*`; `hue_turn` in turns; `sigma` in pixels, 0 for no blur. `sigma` and `solarize` are None where the
    recipe never blurs or solarizes.
    """
    b, _, h, w = shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(b, generator=generator, device=generator.device)

    def chance(p: float) -> Tensor:
        return torch.rand(b, generator=generator, device=generator.device) < p

    area = uniform(*recipe.crop_scale) * h * w
    low, high = (torch.tensor(r).log().item() for r in recipe.crop_ratio)
    ratio = uniform(low, high).exp()
    height = (area / ratio).sqrt().clamp(max=h)
    width = (area * ratio).sqrt().clamp(max=w)
    jittered = chance(recipe.jitter).float()
    return dict(
        height=height,
        width=width,
        top=uniform(0, 1) * (h - height),
        left=uniform(0, 1) * (w - width),
        flip=chance(recipe.flip),
        brightness_factor=1 + jittered * uniform(-recipe.brightness, recipe.brightness),
        contrast_factor=1 + jittered * uniform(-recipe.contrast, recipe.contrast),
        saturation_factor=1 + jittered * uniform(-recipe.saturation, recipe.saturation),
        hue_turn=jittered * uniform(-recipe.hue, recipe.hue),
        grey=chance(recipe.grey),
        sigma=chance(recipe.blur) * uniform(*recipe.blur_sigma) if recipe.blur else None,
        solarize=chance(recipe.solarize) if recipe.solarize else None,
    )


def apply(x: Tensor, draws: dict[str, Tensor | None]) -> Tensor:
    """Return x [B, C, H, W] in [0, 1], changed as drawn: crop, flip, blur; then colours; then solarize."""
    _, c, h, w = x.shape
    rows = _resampling(h, draws["top"], draws["height"])
    columns = _resampling(w, draws["left"], draws["width"])
    columns = torch.where(draws["flip"][:, None, None], columns.flip(1), columns)
    if draws["sigma"] is not None:
        rows, columns = _blurring(h, draws["sigma"]) @ rows, _blurring(w, draws["sigma"]) @ columns
    # [B, 1, H, H] @ [B, C, H, W] @ [B, 1, W, W]
    x = rows[:, None] @ x @ columns.mT[:, None]
    matrix, offset = _colours(x.mean((2, 3)), draws)
    x = torch.baddbmm(offset[:, :, None], matrix, x.flatten(2)).clamp(0, 1).view_as(x)
    if draws["solarize"] is not None:
        x = torch.where(draws["solarize"][:, None, None, None] & (x >= 0.5), 1 - x, x)
    return x


def _resampling(n: int, start: Tensor, length: Tensor) -> Tensor:
    """Return [B, n, n]: row i holds the bilinear weights of output pixel i of a crop stretched to n pixels."""
    centre = torch.arange(n, device=start.device) + 0.5
    source = start[:, None] + centre * length[:, None] / n - 0.5  # [B, n] in input pixels
    source = source.clamp(0, n - 1)
    return (1 - (source[:, :, None] - torch.arange(n, device=start.device)).abs()).clamp(min=0)


def _blurring(n: int, sigma: Tensor) -> Tensor:
    """Return [B, n, n]: a Gaussian cut at n/20 pixels, edges reflected; the identity where sigma is 0."""
    radius = max(1, round(n / 20))
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)  # [B, taps]
    weights = weights / weights.sum(1, keepdim=True)
    source = torch.arange(n, device=sigma.device)[:, None] + taps  # [n, taps]
    source = (n - 1) - (source.abs() - (n - 1)).abs()  # reflect at both ends
    shifts = torch.nn.functional.one_hot(source.T, n).float()  # [taps, n, n]
    return (weights @ shifts.flatten(1)).view(-1, n, n)


def _colours(mean: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return each image's colour matrix [B, C, C] and offset [B, C].

    mean: [B, C], the image's mean colour, which contrast needs. The order is brightness, contrast, saturation,
    hue, grey; values are clamped once, at the end. Hue turns the chroma plane of YIQ, which is linear; HSV is not.
    """
    b, c = mean.shape
    matrix = draws["brightness_factor"][:, None, None] * torch.eye(c, device=mean.device)
    luma = torch.tensor(GREY if c == 3 else [1 / c] * c, device=mean.device)
    contrast = draws["contrast_factor"][:, None]
    level = (matrix @ mean[:, :, None])[:, :, 0] @ luma  # mean grey after brightness, [B]
    offset = ((1 - contrast) * level[:, None]).expand(b, c)
    matrix = contrast[:, :, None] * matrix
    if c == 3:
        to_grey = luma.expand(3, 3)  # every output channel is the luma
        saturation = draws["saturation_factor"][:, None, None]
        mix = saturation * torch.eye(3, device=mean.device) + (1 - saturation) * to_grey
        mix = _hue_rotation(draws["hue_turn"]) @ mix
        mix = torch.where(draws["grey"][:, None, None], to_grey, mix)
        matrix, offset = mix @ matrix, (mix @ offset[:, :, None])[:, :, 0]
    return matrix, offset


def _hue_rotation(turn: Tensor) -> Tensor:
    """Return [B, 3, 3]: a turn of the chroma plane of YIQ (FCC NTSC), luma unchanged."""
    to_yiq = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], device=turn.device)
    angle = 2 * torch.pi * turn
    rotation = torch.zeros(len(turn), 3, 3, device=turn.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2] = -angle.sin()
    rotation[:, 2, 1] = angle.sin()
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq
