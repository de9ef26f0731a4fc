"""Starts that stay as they are: frozen features that a gain of pre-training on our own images is compared with."""

from torch import Tensor, nn

from ptglab.errors import one_of
from ptglab.train import backbones, engine, patches, starts

CONTROLS = ("random", "pixels", "patches")
SIDE = 16  # pixels a side that `pixels` has at most
SIZES = {"lite0": 64}  # pixels a side at which a start that others have trained sees the images, if not its own size


def known(init: str) -> bool:
    """Return whether `init` is one of CONTROLS or a start of `starts.load` that has a name."""
    return init in CONTROLS or init in starts.STARTS or init.startswith("timm:")


def frozen(
    init: str, backbone: str, width: int, images: Tensor, seed: int, place: engine.Place | None = None
) -> nn.Module:
    """Return a network with `num_features` for images like uint8 `images` [N, C, H, W], which is not to be trained.

    init: `random`, the backbone with the weights it was drawn with; `pixels`, averaged to half of the sides and at most
    SIDE; `patches`, learned from the images; or what `starts.load` has, trained on other images, which sees these
    enlarged to SIZES. Raises InputError for another init, and for a start that is not to be had.
    """
    if not known(init):
        one_of("init", init, [*CONTROLS, *starts.STARTS, "timm:NAME"])
    if init == "random":
        return backbones.build(backbone, width, images, seed)
    if init == "patches":
        return patches.learn(images, seed, place)
    if init != "pixels":
        return starts.load(init, SIZES.get(init, 0))
    sides = [min(SIDE, -(-side // 2)) for side in images.shape[2:]]
    network = nn.Sequential(nn.AdaptiveAvgPool2d(sides), nn.Flatten())
    network.num_features = images.shape[1] * sides[0] * sides[1]
    return network
