"""The ResNets against torchvision's, and weights that load strictly or not at all."""

import json
import os
import pickle
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from ptglab.errors import InputError
from ptglab.train import backbones

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
EXPANSION = {"resnet18": 1, "resnet34": 1, "resnet50": 4}


def uint8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours, peer = backbones.ResNet(name, 64, 3), getattr(torchvision.models, name)()
    ours = {k: v.shape for k, v in ours.state_dict().items()}
    peer = {k: v.shape for k, v in peer.state_dict().items()}
    assert ours.keys() - peer.keys() == {"mean", "std"}
    assert peer.keys() - ours.keys() == {"fc.weight", "fc.bias"}
    assert {k for k in ours.keys() & peer.keys() if ours[k] != peer[k]} == {"conv1.weight"}
    assert ours["conv1.weight"] == (64, 3, 3, 3)


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_blocks_compute_what_torchvisions_do(name):
    """The four layers with torchvision's weights and random statistics, in float64: output, gradient of the input."""
    torch.manual_seed(0)
    peer = getattr(torchvision.models, name)(num_classes=2)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0), nn.init.normal_(module.bias, std=0.1)
    with torch.device("meta"):
        ours = backbones.ResNet(name, 64, 3)
    ours.to_empty(device="cpu")
    weights = {k: v for k, v in peer.state_dict().items() if not k.startswith(("fc.", "conv1."))}
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"mean", "std", "conv1.weight"}
    x = torch.randn(4, 64, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    for training in (False, True):
        outputs = []
        for network in (ours.double().train(training), peer.double().train(training)):
            x = x.detach().requires_grad_()
            y = network.layer4(network.layer3(network.layer2(network.layer1(x))))
            outputs += [y.detach(), *torch.autograd.grad(y.square().mean(), x)]
        assert outputs[0].abs().max() > 0.1 and outputs[1].abs().max() > 1e-6
        torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(outputs[1], outputs[3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", backbones.BACKBONES)
@pytest.mark.parametrize("width, channels", [(4, 1), (8, 3)])
def test_sizes(name, width, channels):
    """The stem keeps 32 x 32 up to layer2; each later layer halves it; features are 8 x width x expansion."""
    backbone = backbones.ResNet(name, width, channels).eval()
    seen = {}
    for layer in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        getattr(backbone, layer).register_forward_hook(lambda m, i, o, layer=layer: seen.update({layer: o.shape[1:]}))
    features = backbone(torch.rand(2, channels, 32, 32))
    e = EXPANSION[name]
    assert {k: tuple(v) for k, v in seen.items()} == {
        "conv1": (width, 32, 32),
        "layer1": (width * e, 32, 32),
        "layer2": (2 * width * e, 16, 16),
        "layer3": (4 * width * e, 8, 8),
        "layer4": (8 * width * e, 4, 4),
    }
    assert features.shape == (2, backbone.num_features) == (2, 8 * width * e)
    assert backbone(torch.rand(2, channels, 13, 21)).shape == features.shape  # no size is built in


MAKERS = {
    "build": lambda seed: backbones.build("resnet18", 4, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), seed),
    "projector": lambda seed: backbones.projector(6, 8, 4, 3, seed),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_weights_depend_on_the_seed_alone(make):
    """And leave the global generators as they were, those of a GPU too."""
    torch.manual_seed(5)
    first, before = make(0), torch.get_rng_state()
    torch.manual_seed(6)
    assert same(first, make(0)) and same(first, make(np.int64(0))) and not same(first, make(1))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projector_is_its_matrices(layers):
    module = backbones.projector(5, 7, 3, layers, seed=0)
    linears = [m for m in module if isinstance(m, nn.Linear)]
    shapes = {1: [(3, 5)], 2: [(7, 5), (3, 7)], 3: [(7, 5), (7, 7), (3, 7)]}
    assert [tuple(m.weight.shape) for m in linears] == shapes[layers]
    x = y = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    for linear in linears[:-1]:
        y = y @ linear.weight.T
        y = ((y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(module(x), y @ linears[-1].weight.T)


def test_head_starts_undecided_and_standardises():
    head = backbones.head(4, 3)
    x = 5 + 3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(x), torch.zeros(64, 3))
    assert len(list(head.parameters())) == 2  # the weights and biases of the classifier only
    nn.init.eye_(head[1].weight)
    expected = (x - x.mean(0)) / x.std(0, unbiased=False)
    torch.testing.assert_close(head(x), expected[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, width, channels, classes", [("resnet18", 4, 1, 7), ("resnet50", 2, 3, None)])
def test_save_and_load(tmp_path, name, width, channels, classes):
    """Every tensor, as moved to channels-last and in any mode; nothing else is left in the folder."""
    backbone = backbones.build(name, width, uint8(8, channels, 8, 8), seed=3)
    head = backbones.head(backbone.num_features, classes) if classes else None
    if head:
        nn.init.normal_(head[1].weight)
    backbone.to(memory_format=torch.channels_last)(torch.rand(4, channels, 8, 8))  # moves the running statistics
    path = tmp_path / "model.safetensors"
    for _ in range(2):  # the second time over the first
        backbones.save(path, backbone, head)
    assert list(tmp_path.iterdir()) == [path]
    again, head_again = backbones.load(path)
    assert same(again, backbone) and again.sizes == backbone.sizes
    assert (head_again is None) == (head is None) and (head is None or same(head_again, head))
    x = torch.rand(2, channels, 8, 8)
    torch.testing.assert_close(again.eval()(x), backbone.eval()(x))


def spoil(path, change) -> None:
    """Rewrite the weights at `path` after `change(tensors, sizes)`."""
    tensors, sizes = load_file(path), {"name": "resnet18", "width": 2, "channels": 1}
    change(tensors, sizes)
    save_file(tensors, path, metadata={"sizes": json.dumps(sizes)})


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t, s: t.pop("backbone.layer4.1.bn2.weight"), r"Missing key.*layer4\.1\.bn2\.weight"),
        (lambda t, s: t.update({"backbone.fc.weight": torch.zeros(2)}), r"Unexpected key.*fc\.weight"),
        (lambda t, s: s.update(width=4), "size mismatch"),
        (lambda t, s: s.update(num_classes=3), r"Missing key.*head"),
        (lambda t, s: s.update(depth=18), "depth"),
        (lambda t, s: s.pop("name") and s.update(name="resnet19"), "unknown backbone 'resnet19'"),
    ],
    ids=["missing", "extra", "width", "head", "sizes", "name"],
)
def test_load_is_strict(tmp_path, change, says):
    path = tmp_path / "model.safetensors"
    backbones.save(path, backbones.ResNet("resnet18", 2, 1))
    spoil(path, lambda tensors, sizes: None)
    backbones.load(path)  # not the rewriting is at fault
    spoil(path, change)
    with pytest.raises(InputError, match=says) as error:
        backbones.load(path)
    assert "\n" not in str(error.value)


def _foreign(path, metadata=None) -> None:
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("these are no weights\n" * 9),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        _foreign,
        lambda path: _foreign(path, {"format": "pt"}),
        lambda path: _foreign(path, {"sizes": "large"}),
        lambda path: _foreign(path, {"sizes": "7"}),
        lambda path: torch.save({"weight": torch.zeros(3)}, path),
    ],
    ids=["text", "empty", "folder", "foreign", "foreign_metadata", "sizes_no_json", "sizes_no_dict", "pickle"],
)
def test_what_is_no_network_of_ours(tmp_path, write):
    path = tmp_path / "model.safetensors"
    write(path)
    with pytest.raises(InputError, match="model.safetensors holds no network of ours") as error:
        backbones.load(path)
    assert "\n" not in str(error.value)


def test_missing_weights_name_the_mend(tmp_path):
    with pytest.raises(InputError, match="no weights at .*absent.safetensors: run the notebook"):
        backbones.load(tmp_path / "absent.safetensors")


def test_unknown_backbone_and_width():
    images = uint8(2, 1, 4, 4)
    with pytest.raises(InputError, match="unknown backbone 'resnet81': did you mean 'resnet18'"):
        backbones.build("resnet81", 8, images, 0)
    with pytest.raises(InputError, match="width is 0"):
        backbones.build("resnet18", 0, images, 0)


def test_narrow_networks_do_not_corrupt_memory():
    """oneDNN's backward of a strided 1x1 convolution aborts the process here; hence the sliced shortcut."""
    code = """
import torch
from ptglab.train import backbones
from ptglab.train import engine
torch.set_num_threads(2)
place = engine.place("cpu")
for rows in (25, 31, 33):
    network = place.put(backbones.ResNet("resnet18", 8, 1))
    for _ in range(10):
        network(place.batch(torch.rand(rows, 1, 16, 16))).square().sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def torchvision_weights(tmp_path_factory):
    """Return (torchvision's network with random weights, its file as .pth, as .safetensors)."""
    peer = torchvision.models.resnet18().eval()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(peer.state_dict(), folder / "weights.pth")
    save_file(peer.state_dict(), folder / "weights.safetensors")
    return peer, folder / "weights.pth", folder / "weights.safetensors"


@pytest.mark.parametrize("file", [1, 2], ids=["pth", "safetensors"])
def test_imagenet_weights_are_torchvision_s_after_the_stem(torchvision_weights, file):
    """The stages, fed with the same maps, give what torchvision's give, but for the resolution of the stem."""
    peer = torchvision_weights[0]
    network = backbones.imagenet("resnet18", IMAGES, torchvision_weights[file]).eval()
    x = torch.rand(2, 64, 8, 8)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        y, expected = getattr(network, name)(x), getattr(peer, name)(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        x = expected
    assert network.sizes == {"name": "resnet18", "width": 64, "channels": 3}
    torch.testing.assert_close(network.mean, torch.tensor([0.485, 0.456, 0.406]))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_see_a_grey_image_as_three_would(torchvision_weights, channels):
    """A grey image in every channel, standardised: the stem's answer is the same as in colour."""
    path = torchvision_weights[1]
    colour = backbones.imagenet("resnet18", IMAGES, path)
    other = backbones.imagenet("resnet18", IMAGES[:, :1].repeat(1, channels, 1, 1), path)
    grey = torch.randn(2, 1, 9, 9)
    expected = colour.conv1(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(other.conv1(grey.expand(-1, channels, -1, -1)), expected, rtol=1e-4, atol=1e-4)
    assert len(other.mean) == channels


def test_weights_that_are_none_are_refused(tmp_path, torchvision_weights):
    """In one line: no file, no tensors, a pickle with code in it, another network."""
    (tmp_path / "text.pth").write_text("no weights")

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    (tmp_path / "harm.pth").write_bytes(pickle.dumps(Harm(), protocol=2))
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    for name in ("absent.pth", "absent.safetensors", "text.pth", "harm.pth", "other.pth", "resnet34.pth"):
        with pytest.raises(InputError, match=name) as error:
            backbones.imagenet("resnet18", IMAGES, tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "harmed").exists()


def test_without_a_network_and_a_cache_the_weights_are_said_to_be_missing(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="no ImageNet weights of resnet18 in torch's cache .* no network"):
        backbones.imagenet("resnet18", IMAGES)
