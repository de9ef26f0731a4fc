"""Frozen features that gains are compared with: what each is, and what is no such start."""

import numpy as np
import pytest
import torch
from expected import refused
from torch import nn

from ptglab.lab import metrics
from ptglab.train import backbones, controls, engine, patches, predict


def look(init: str, images: torch.Tensor, seed: int = 0) -> np.ndarray:
    network = controls.frozen(init, "resnet18", 4, images, seed, engine.place("cpu"))
    found = predict.features(network, images, engine.place("cpu"))
    assert found.shape == (len(images), network.num_features)
    return found


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (3, 5, 8), (4, 2, 1)])
def test_pixels_are_averaged_to_half_of_the_sides(channels, height, width):
    images = torch.randint(0, 256, (3, channels, height, width), dtype=torch.uint8)
    expected = nn.functional.adaptive_avg_pool2d(images.double() / 255, (-(-height // 2), -(-width // 2)))
    np.testing.assert_allclose(look("pixels", images), expected.flatten(1), atol=1e-6)


def test_pixels_of_large_images_stay_few():
    assert look("pixels", torch.zeros(1, 3, 100, 40, dtype=torch.uint8)).shape == (1, 3 * 16 * 16)


def test_random_is_the_backbone_as_it_was_drawn(few):
    """The very network that scratch begins with; another seed draws another."""
    untrained = backbones.build("resnet18", 4, few.images, 7)
    np.testing.assert_array_equal(
        look("random", few.images, 7), predict.features(untrained, few.images, engine.place("cpu"))
    )
    assert np.abs(look("random", few.images, 7) - look("random", few.images, 8)).max() > 0.01


def test_controls_know_digits_in_their_order(few, monkeypatch):
    """By neighbours among the others: an untrained network less than pixels, and each far more than chance."""
    monkeypatch.setattr(patches, "SAMPLES", 4000)
    bank, labels, known = np.arange(len(few)) % 4 != 0, few.labels_given, {}
    for init in (*controls.CONTROLS, "lite0"):
        x = look(init, few.images)
        known[init] = metrics.knn_accuracy(x[bank], labels[bank], x[~bank], labels[~bank], k=5)
    assert min(known.values()) > 0.4 and known["random"] < known["pixels"] < 1, known
    assert known["lite0"] > 0.7, known


def test_what_is_no_control_is_refused(few):
    for init in ("scratch", "simclr", "imagenet", "lite1", ""):
        assert not controls.known(init)
        refused("init", "patches", "lite0", call=look)(init, few.images)
    assert all(map(controls.known, ["random", "pixels", "patches", "lite0", "dinov2", "timm:resnet18.tv_in1k"]))
