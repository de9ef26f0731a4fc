import numpy as np
import pytest
import torch
from expected import refused

from ptglab.lab import metrics
from ptglab.train import backbones, engine, patches, predict


def learned(images: torch.Tensor, **options) -> patches.Patches:
    return patches.learn(images, 0, engine.place("cpu"), **options)


def uint8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_responses_by_hand(channels):
    """Patch by patch: mean 0, variance 1, whitened, how much nearer than average to each centroid; region means."""
    side, k, rng = 3, 7, np.random.default_rng(channels)
    size = channels * side**2
    root = rng.normal(size=(size, size))
    whitening, mean, centroids = root @ root.T / size, rng.normal(size=size), rng.normal(size=(k, size))
    tensors = (torch.tensor(a, dtype=torch.float32) for a in (whitening, mean, centroids))
    network, x = patches.Patches(channels, side, k), 255 * rng.random((2, channels, 7, 8))
    network.compare(*tensors)
    expected = np.zeros((2, k, 5, 6))
    for i, top, left in np.ndindex(2, 5, 6):
        patch = x[i, :, top : top + side, left : left + side].ravel()
        patch = (patch - patch.mean()) / np.sqrt(patch.var() + 10)
        distance = np.linalg.norm((patch - mean) @ whitening - centroids, axis=1)
        expected[i, :, top, left] = np.maximum(0, distance.mean() - distance)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(expected), 2).flatten(1)
    ours = network(torch.tensor(x / 255, dtype=torch.float32))
    np.testing.assert_allclose(ours, pooled, rtol=1e-3, atol=1e-3)
    assert (pooled > 0.05).any()


def test_features_are_the_principal_directions_of_the_responses(few):
    """Uncorrelated, of falling variance, which together hold most of that of the standardised responses."""
    network = learned(few.images, number=50, out=40)
    x = predict.features(network, few.images, engine.place("cpu"))
    assert x.shape == (256, 40) and network.num_features == 40
    assert np.abs(x.mean(0)).max() < 1e-2
    correlation = np.corrcoef(x.T) - np.eye(40)
    assert np.abs(correlation).max() < 1e-2
    variance = x.var(0)
    assert (np.diff(variance) < 1e-3 * variance[0]).all() and 0.7 * 200 < variance.sum() <= 200 * 1.001


def textures(n: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Return (images uint8 [N, 3, 24, 24], labels [N]) of stripes in four directions, of any colour, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 4)
    down, across = np.mgrid[:24, :24]
    angle = labels * np.pi / 4 + rng.normal(0, 0.15, n)
    phase = np.cos(angle)[:, None, None] * across + np.sin(angle)[:, None, None] * down
    wave = np.sin(phase * rng.uniform(0.8, 1.6, n)[:, None, None] + rng.uniform(0, 2 * np.pi, n)[:, None, None])
    colour = rng.uniform(60, 196, (n, 3, 1, 1)) + rng.uniform(-50, 50, (n, 3, 1, 1)) * wave[:, None]
    return torch.from_numpy((colour + rng.normal(0, 10, (n, 3, 24, 24))).clip(0, 255).astype(np.uint8)), labels


@pytest.mark.parametrize("n", [64, 128, 300])
def test_heads_know_the_labels_of_few_images(n):
    """Of N - 1 directions the last are noise: as loud as the first, they would put all images equally far apart."""
    images, labels = textures(n)
    x = predict.features(learned(images, number=100), images, engine.place("cpu"))
    agreement = (predict.out_of_fold(x, labels, 4).argmax(1) == labels).mean()
    assert agreement > 0.6, agreement


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_fewest_directions_that_hold_a_share_of_the_variance(few, share):
    every, fewer = learned(few.images, number=20, out=80), learned(few.images, number=20, out=80, share=share)
    held = predict.features(every, few.images, engine.place("cpu")).var(0).cumsum() / 80
    assert held[fewer.num_features - 1] >= share - 1e-3 and held[fewer.num_features - 2] < share
    np.testing.assert_allclose(
        predict.features(fewer, few.images, engine.place("cpu")),
        predict.features(every, few.images, engine.place("cpu"))[:, : fewer.num_features],
        atol=1e-4,
    )


def test_patches_tell_digits_apart(digits):
    """Neighbours in the rest vote for the label of each of a quarter of the images."""
    x = predict.features(learned(digits.images), digits.images, engine.place("cpu"))
    bank, labels = np.arange(len(digits)) % 4 != 0, digits.labels_given
    assert metrics.knn_accuracy(x[bank], labels[bank], x[~bank], labels[~bank]) > 0.98


def test_no_draw_but_the_seeds(few):
    first, again = (learned(few.images, number=20) for _ in range(2))
    other = patches.learn(few.images, 1, engine.place("cpu"), number=20)
    assert torch.equal(first.filters, again.filters) and torch.equal(first.directions, again.directions)
    assert not torch.equal(first.centroids, other.centroids)


def test_images_do_not_depend_on_each_other(few):
    network, place = learned(few.images, number=20), engine.place("cpu")
    whole = predict.features(network, few.images[:130], place)
    np.testing.assert_allclose(predict.features(network, few.images[64:70], place), whole[64:70], atol=1e-3)


@pytest.mark.parametrize("shape", [(10, 1, 4, 4), (12, 3, 5, 40), (30, 2, 16, 16)])
def test_few_or_tiny_images_of_any_channels(shape):
    x = predict.features(learned(uint8(*shape), number=30), uint8(*shape), engine.place("cpu"))
    assert x.shape == (shape[0], min(shape[0] - 1, 120)) and np.isfinite(x).all()


def test_blank_images_are_finite():
    images = torch.full((20, 3, 12, 12), 7, dtype=torch.uint8)
    assert np.isfinite(predict.features(learned(images, number=10), images, engine.place("cpu"))).all()


def test_saved_patches_have_the_same_features(few, tmp_path):
    network, place = learned(few.images, number=20, out=12), engine.place("cpu")
    patches.save(tmp_path / "patches.safetensors", network)
    back = patches.load(tmp_path / "patches.safetensors")
    assert back.num_features == 12
    np.testing.assert_array_equal(*(predict.features(each, few.images, place) for each in (network, back)))


def test_a_file_of_other_weights_is_refused(few, tmp_path):
    backbones.save(tmp_path / "other", backbones.build("resnet18", 1, few.images, 0))
    for name in ("other", "none"):
        refused(f"{tmp_path / name} holds no learned patches", call=patches.load)(tmp_path / name)
