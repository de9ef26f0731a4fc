"""Starts that stay as they are: frozen features that a gain of pre-training on our own images is compared with."""

from torch import Tensor, nn

from ptglab.errors import one_of
from ptglab.train import backbones, engine, patches, starts

CONTROLS = ("random", "pixels", "patches")
SIZES = {"lite0": 128}  # pixels a side to which images are enlarged for a start, if not its own size


def known(init: str) -> bool:
    """Return whether `init` is one of CONTROLS or has a name that `starts.load` knows."""
    return init in (*CONTROLS, *starts.STARTS) or init.startswith("timm:")


def frozen(
    init: str, backbone: str, width: int, images: Tensor, seed: int, place: engine.Place | None = None
) -> nn.Module:
    """Return a network with `num_features` for images like uint8 `images` [N, C, H, W], which is not to be trained.

    init: `random`, the backbone as it is drawn; `pixels`, averaged to half of the sides, at most 16; `patches`, learned
    from the images; or a name of `starts.load`. Raises InputError for another one, or if it is not to be had.
    """
    if init == "random":
        return backbones.build(backbone, width, images, seed)
    if init == "patches":
        return patches.learn(images, seed, place, share=0.9)  # heads standardise the rest, and memorise by it
    if init != "pixels":
        one_of("init", init, [init] if known(init) else [*CONTROLS, *starts.STARTS, "timm:NAME"])
        return starts.load(init, SIZES.get(init, 0))
    sides = [min(16, -(-side // 2)) for side in images.shape[2:]]
    network = nn.Sequential(nn.AdaptiveAvgPool2d(sides), nn.Flatten())
    network.num_features = images.shape[1] * sides[0] * sides[1]
    return network
