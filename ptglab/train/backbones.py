"""ResNets with the CIFAR stem and a width, the projector, the head; weights load strictly."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ptglab.errors import InputError, one_of
from ptglab.train import checkpoints

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Convolutions with batch norm and a shortcut: 3x3, 3x3; or with `expansion` 4 a bottleneck 1x1, 3x3, 1x1."""

    def __init__(self, channels: int, planes: int, stride: int, expansion: int):
        super().__init__()
        kernels = (3, 3) if expansion == 1 else (1, 3, 1)
        first, incoming = kernels.index(3), channels  # the first 3x3 convolution takes the stride
        for i, kernel in enumerate(kernels, 1):
            width = planes * expansion if i == len(kernels) else planes
            step = stride if i - 1 == first else 1
            setattr(self, f"conv{i}", nn.Conv2d(incoming, width, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
            incoming = width
        self.depth = len(kernels)
        plain = stride == 1 and channels == incoming
        self.downsample = nn.Identity() if plain else Shortcut(channels, incoming, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y)).relu_()
        y = getattr(self, f"bn{self.depth}")(getattr(self, f"conv{self.depth}")(y))
        return y.add_(self.downsample(x)).relu_()


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


# name -> expansion of the blocks, blocks a stage
BACKBONES = {"resnet18": (1, (2, 2, 2, 2)), "resnet34": (1, (3, 4, 6, 3)), "resnet50": (4, (3, 4, 6, 3))}


class ResNet(nn.Module):
    """A ResNet for small images: 3x3 stem of stride 1 without max-pool, global average pool, no classifier.

    He et al. 2016 (arXiv 1512.03385) with the stem of SimCLR's CIFAR experiments (arXiv 2002.05709, B.9).
    Input float [B, channels, H, W] in [0, 1], standardised inside by the `mean` and `std` it carries;
    output features [B, num_features]. Parameter names are torchvision's.
    """

    def __init__(self, name: str = "resnet18", width: int = 64, channels: int = 3):
        super().__init__()
        expansion, depths = BACKBONES[one_of("backbone", name, BACKBONES)]
        if width < 1:
            raise InputError(f"width is {width}; it must be at least 1")
        self.sizes = {"name": name, "width": width, "channels": channels}
        self.register_buffer("mean", torch.full((channels,), 0.5))
        self.register_buffer("std", torch.full((channels,), 0.25))
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        incoming = width
        for i, depth in enumerate(depths):
            planes = width << i
            blocks = []
            for j in range(depth):
                blocks.append(Block(incoming, planes, 2 if i and not j else 1, expansion))
                incoming = planes * expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.num_features = incoming
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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        backbone = ResNet(name, width, images.shape[1])
    sample = images[:: max(1, -(-len(images) // 10_000))].float() / 255
    backbone.mean.copy_(sample.mean((0, 2, 3)))
    backbone.std.copy_(sample.std((0, 2, 3)).clamp(min=0.01))
    return backbone


def imagenet(name: str, images: Tensor, weights: str | Path | None = None) -> ResNet:
    """Return a backbone of width 64 for uint8 `images` [N, C, H, W] that begins with torchvision's ImageNet weights.

    `weights` is a file of them (.pth or .safetensors); without one they come from torch's cache, or are downloaded
    into it. The stem of 7x7 is resized to ours of 3x3, its sums about kept; a channel count other than 3 shares the
    mean of the three colours' filters. Raises InputError if there are no such weights, or if the file holds others.
    """
    backbone = ResNet(name, 64, images.shape[1])
    found = _imagenet_weights(name, weights)
    try:
        stem = found["conv1.weight"]  # [64, 3, 7, 7]
        small = F.interpolate(stem, (3, 3), mode="bilinear", antialias=True) * (49 / 9)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        if (channels := images.shape[1]) != 3:
            small = small.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels
            mean, std = (x.mean().repeat(channels) for x in (mean, std))
        kept = {k: v for k, v in found.items() if not k.startswith("fc.")}
        backbone.load_state_dict(kept | {"conv1.weight": small, "mean": mean, "std": std}, strict=True)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        where = weights or "torch's cache"
        raise InputError(f"{where} holds no ImageNet weights of {name}: {str(error).splitlines()[0][:200]}") from None
    return backbone


def _imagenet_weights(name: str, weights: str | Path | None) -> dict[str, Tensor]:
    """Return the state of torchvision's network; see `imagenet`. Only tensors are ever unpickled."""
    from torchvision.models import get_model_weights

    one_of("backbone", name, BACKBONES)
    try:
        if weights is None:
            url = get_model_weights(name).DEFAULT.url
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        if Path(weights).suffix == ".safetensors":
            return load_file(weights)
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign pickle makes the unpickler say, or a broken connection
        where = weights or f"torch's cache ({torch.hub.get_dir()}) or to be downloaded"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"no ImageNet weights of {name} in {where}: {reason}") from None


def projector(features: int, hidden: int, out: int, layers: int, seed: int) -> nn.Sequential:
    """Return an MLP [B, features] -> [B, out] of `layers` linear layers, batch norm and ReLU between them."""
    sizes = [features] + [hidden] * (layers - 1) + [out]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        modules = []
        for a, b in zip(sizes[:-2], sizes[1:-1], strict=True):
            modules += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
        return nn.Sequential(*modules, nn.Linear(sizes[-2], sizes[-1], bias=False))


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
