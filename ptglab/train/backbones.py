"""ResNets with the CIFAR stem and a width, the projector, the head; weights load strictly."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck

from ptglab.errors import InputError, one_of
from ptglab.train import checkpoints

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shortcut(nn.Sequential):
    """1x1 convolution of stride `stride`, and batch norm.

    The stride is taken by slicing: oneDNN writes out of bounds in the backward pass of a strided 1x1 convolution,
    channels-last, with fewer input channels than a vector register holds (seen with torch 2.15, width 8, two threads).
    """

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.stride, :: self.stride])


# name -> kind of block, blocks a stage
BACKBONES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """A ResNet for small images: 3x3 stem of stride 1 without max-pool, global average pool, no classifier.

    He et al. 2016 (arXiv 1512.03385) with the stem of SimCLR's CIFAR experiments (arXiv 2002.05709, B.9).
    Input float [B, channels, H, W] in [0, 1], standardised inside by the `mean` and `std` it carries;
    output features [B, num_features]. Parameter names are torchvision's.
    """

    def __init__(self, name: str = "resnet18", width: int = 64, channels: int = 3):
        super().__init__()
        block, depths = BACKBONES[one_of("backbone", name, BACKBONES)]
        if width < 1:
            raise InputError(f"width is {width}; it must be at least 1")
        self.sizes = {"name": name, "width": width, "channels": channels}
        self.register_buffer("mean", torch.full((channels,), 0.5))
        self.register_buffer("std", torch.full((channels,), 0.25))
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.num_features = width
        for i, depth in enumerate(depths):
            planes, stride, incoming = width << i, 2 if i else 1, self.num_features
            self.num_features = planes * block.expansion
            plain = stride == 1 and incoming == self.num_features
            shortcut = None if plain else Shortcut(incoming, self.num_features, stride)
            blocks = [block(incoming, planes, stride, shortcut)]
            blocks += [block(self.num_features, planes) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        x = self.bn1(self.conv1(x)).relu_()
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))


def build(name: str, width: int, images: Tensor, seed: int) -> ResNet:
    """Return a new backbone for uint8 `images` [N, C, H, W], its weights drawn from `seed` alone.

    The channel count and the mean and standard deviation it standardises by come from (at most 10,000 of) the
    images. Raises InputError for an unknown name.
    """
    with seeded(seed):
        backbone = ResNet(name, width, images.shape[1])
    sample = images[:: max(1, -(-len(images) // 10_000))].float() / 255
    backbone.mean.copy_(sample.mean((0, 2, 3)))
    backbone.std.copy_(sample.std((0, 2, 3)).clamp(min=0.01))
    return backbone


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the weights of new modules from `seed`; torch's own generator is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        yield


def imagenet(name: str, images: Tensor, weights: str | Path | None = None) -> ResNet:
    """Return a backbone of width 64 for uint8 `images` [N, C, H, W] that begins with torchvision's ImageNet weights.

    `weights` is a file of them (.pth or .safetensors); without one they come from torch's cache, or are downloaded
    into it. The stem of 7x7 is resized to ours of 3x3, its sums about kept; a channel count other than 3 shares the
    mean of the three colours' filters. Raises InputError if there are no such weights, or if the file holds others.
    """
    backbone, channels = ResNet(name, 64, images.shape[1]), images.shape[1]
    try:  # only tensors are ever unpickled
        if weights is None:
            url = get_model_weights(name).DEFAULT.url
            found = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        elif Path(weights).suffix == ".safetensors":
            found = load_file(weights)
        else:
            found = torch.load(weights, map_location="cpu", weights_only=True)
        stem = F.interpolate(found["conv1.weight"], (3, 3), mode="bilinear", antialias=True) * (49 / 9)  # [64, 3, 3, 3]
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        if channels != 3:
            stem = stem.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels
            mean, std = (x.mean().repeat(channels) for x in (mean, std))
        kept = {k: v for k, v in found.items() if not k.startswith("fc.")}
        backbone.load_state_dict(kept | {"conv1.weight": stem, "mean": mean, "std": std}, strict=True)
    except Exception as error:  # whatever a foreign pickle makes the unpickler say, or a broken connection
        where = weights or f"torch's cache ({torch.hub.get_dir()}) or to be downloaded"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"no ImageNet weights of {name} in {where}: {reason}") from None
    return backbone


def projector(features: int, hidden: int, out: int, layers: int, seed: int, norm: bool = True) -> nn.Sequential:
    """Return an MLP [B, features] -> [B, out] of `layers` linear layers, batch norm and ReLU between them.

    Without `norm`, biases take the place of the batch norms.
    """
    modules = []
    with seeded(seed):
        for _ in range(layers - 1):
            modules += [nn.Linear(features, hidden, bias=not norm), *[nn.BatchNorm1d(hidden)] * norm]
            modules.append(nn.ReLU(inplace=True))
            features = hidden
        return nn.Sequential(*modules, nn.Linear(features, out, bias=not norm))


def head(features: int, num_classes: int) -> nn.Sequential:
    """Return a linear classifier [B, features] -> logits [B, num_classes].

    Features are standardised by a batch norm without parameters, so that one learning rate suits every start; the
    weights begin at zero, so that every class is equally likely at first.
    """
    linear = nn.Linear(features, num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(features, affine=False), linear)


def save(path: str | Path, backbone: ResNet, head: nn.Module | None = None) -> None:
    """Write the weights to `path` (safetensors), with the sizes that rebuild the modules in its metadata."""
    sizes, modules = dict(backbone.sizes), {"backbone": backbone}
    if head is not None:
        sizes["num_classes"], modules["head"] = head[1].out_features, head
    weights = {f"{name}.{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    checkpoints.write_tensors(path, weights, {"sizes": json.dumps(sizes)})


def load(path: str | Path) -> tuple[ResNet, nn.Module | None]:
    """Rebuild (backbone, head) as written by `save`; every key must match; the head is None if none was saved.

    Raises InputError if the file is missing, is damaged, is no safetensors file, or holds something else.
    """
    path = Path(path)
    try:
        weights, about = checkpoints.read_tensors(path)
        sizes = json.loads(about["sizes"])
        num_classes = sizes.pop("num_classes", None)
        modules = nn.ModuleDict({"backbone": ResNet(**sizes)})
        if num_classes:
            modules["head"] = head(modules["backbone"].num_features, num_classes)
        modules.load_state_dict(weights, strict=True)
    except FileNotFoundError:
        raise InputError(f"no weights at {path}: run the notebook that trains them first") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} holds no network of ours: {reason}; if it did, it is damaged: delete {path.parent} "
                         "and run again") from None  # fmt: skip
    return modules["backbone"], modules["head"] if num_classes else None
