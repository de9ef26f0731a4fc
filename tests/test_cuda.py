"""The same work on CUDA: run with `pytest -m gpu` on a machine that has one."""

import numpy as np
import pytest
import torch

from ptglab import augment, backbones, engine, finetune, losses, neighbours, predict, pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_auto_chooses_cuda_with_bfloat16():
    place = engine.place()
    assert place.device.type == "cuda" and place.precision == "bfloat16"


@pytest.mark.parametrize("preset", augment.PRESETS)
def test_augmentation_equals_the_cpu(preset):
    x = torch.rand(16, 3, 32, 32)
    for recipe in augment.preset(preset):
        draws = augment.draw(recipe, x.shape, torch.Generator().manual_seed(0))
        on_gpu = augment.apply(x.cuda(), {k: None if v is None else v.cuda() for k, v in draws.items()})
        torch.testing.assert_close(on_gpu.cpu(), augment.apply(x, draws), atol=2e-3, rtol=0)  # tf32 products


@pytest.mark.parametrize("loss", [losses.nt_xent, losses.barlow_twins, losses.vicreg])
def test_losses_equal_the_cpu(loss):
    z1, z2 = torch.randn(64, 32), torch.randn(64, 32)
    torch.testing.assert_close(loss(z1.cuda(), z2.cuda()).cpu(), loss(z1, z2), rtol=1e-3, atol=1e-3)


def test_neighbours_equal_the_cpu():
    x = torch.randn(300, 16)
    np.testing.assert_allclose(neighbours.nearest(x.cuda(), 5)[0], neighbours.nearest(x, 5)[0], atol=2e-3)


@pytest.mark.parametrize("method", pretrain.METHODS)
def test_the_whole_way_runs(few, method):
    place = engine.place("cuda")
    network = backbones.build("resnet18", 16, few.images, 0)
    records = list(
        pretrain.train(network, few.images, method, epochs=2, batch_size=64, place=place, augmentation="digits",
                       projection=64, labels_given=few.labels_given)
    )  # fmt: skip
    assert all(np.isfinite(list(r.values())).all() for r in records)
    features = predict.features(network, few.images, place)
    probs = predict.out_of_fold(features, few.labels_given, 10, device="cuda")
    np.testing.assert_allclose(probs, predict.out_of_fold(features, few.labels_given, 10), atol=2e-2)
    head = backbones.head(network.num_features, 10)
    list(finetune.train(network, head, few.images, few.labels_given, mode="light", epochs=2, place=place))
    assert np.isfinite(predict.probabilities(network, head, few.images, place)).all()
