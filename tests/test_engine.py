"""Where it runs, seeded draws, batches, folds, evaluation: counted, or compared with the plain way."""

import numpy as np
import pytest
import torch
from torch import nn

from ptglab import backbones, engine
from ptglab.errors import InputError


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have a number of CUDA devices."""

    def pretend(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return pretend


@pytest.mark.parametrize(
    "number, device, precision, chosen",
    [
        (0, "auto", "auto", ("cpu", "float32")),
        (2, "auto", "auto", ("cuda", "bfloat16")),
        (2, "cpu", "auto", ("cpu", "float32")),
        (2, "cuda:1", "float32", ("cuda:1", "float32")),
        (0, "cpu", "bfloat16", ("cpu", "bfloat16")),
    ],
)
def test_place(gpus, number, device, precision, chosen):
    gpus(number)
    place = engine.place(device, precision)
    assert (str(place.device), place.precision) == chosen


@pytest.mark.parametrize(
    "number, device, says",
    [
        (0, "cuda", r"'cuda' is not here \(0 CUDA devices\): use device=cpu"),
        (2, "cuda:2", r"'cuda:2' is not here \(2 CUDA devices\)"),
        (0, "gpu", "unknown device 'gpu': use auto, cpu, cuda or cuda:N"),
        (0, "", "unknown device ''"),
        (0, "meta", "unknown device 'meta'"),
        (0, "mps", "unknown device 'mps'"),
    ],
)
def test_place_that_is_not_there(gpus, number, device, says):
    gpus(number)
    with pytest.raises(InputError, match=says) as error:
        engine.place(device)
    assert "\n" not in str(error.value)


def test_unknown_precision():
    with pytest.raises(InputError, match="unknown precision 'float23': did you mean 'float32'"):
        engine.place("cpu", "float23")


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_has_the_precision(precision, dtype):
    with engine.place("cpu", precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_images_and_filters_are_channels_last(cpu):
    images, features = torch.rand(2, 3, 5, 7), torch.rand(2, 3)
    placed = cpu.batch(images)
    assert torch.equal(placed, images) and placed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(cpu.batch(features), features)
    conv = nn.Conv2d(3, 4, 3)
    before = conv.weight.detach().clone()
    assert cpu.put(conv) is conv and torch.equal(conv.weight, before)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_draws_depend_on_seed_and_purpose_alone():
    def draw(*purpose) -> tuple:
        return tuple(torch.rand(4, generator=engine.generator("cpu", *purpose)).tolist())

    purposes = [(s, e, what) for s in range(20) for e in range(50) for what in ("order", "views", "weak")]
    purposes += [(1, 23), (12, 3), (123,), (3, 21), (0,), (10**12,), (10**12, 1)]
    first = {purpose: draw(*purpose) for purpose in purposes}
    assert len(set(first.values())) == len(purposes)
    torch.manual_seed(99)
    assert all(draw(*purpose) == first[purpose] for purpose in purposes[::100])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 50])
def test_shuffled_batches_cover_every_row_once(n, size, drop_last):
    rows = 100 + 3 * torch.arange(n)
    batches = list(engine.shuffled_batches(rows, size, engine.generator("cpu", n), drop_last))
    assert len(batches) == engine.steps_per_epoch(n, size, drop_last)
    seen = torch.cat(batches).tolist()
    assert len(set(seen)) == len(seen) and set(seen) <= set(rows.tolist())
    assert all(len(batch) == size for batch in batches[:-1])
    if not drop_last or n < size:
        assert len(seen) == n
    else:
        assert all(len(batch) == size for batch in batches) and n - len(seen) < size


def test_shuffled_batches_are_a_fair_shuffle_of_the_seed():
    def first(seed: int) -> list[int]:
        return torch.cat(
            list(engine.shuffled_batches(torch.arange(5), 2, engine.generator("cpu", seed), False))
        ).tolist()

    assert first(0) == first(0)
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[range(5), first(seed)] += 1  # which row comes at which place
    assert np.abs(counts - 400).max() < 4.5 * np.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize("number", [2, 3, 5, 10])
@pytest.mark.parametrize("n, k", [(100, 10), (101, 3), (37, 12), (9, 2), (1000, 7)])
def test_folds_are_even_in_size_and_class(n, k, number):
    labels = np.random.default_rng(n).integers(0, k, n) ** 2  # not every class, none as large as another
    fold = engine.folds(labels, number, seed=0)
    assert fold.dtype == np.int64 and fold.shape == (n,)  # every row has exactly one
    sizes = np.bincount(fold, minlength=number)
    assert len(sizes) == number and np.ptp(sizes) <= 1
    for label in np.unique(labels):
        assert np.ptp(np.bincount(fold[labels == label], minlength=number)) <= 1
    assert np.array_equal(fold, engine.folds(labels, number, seed=0))


def test_folds_depend_on_the_seed_and_are_drawn_within_a_class():
    labels = np.repeat([0, 1], 50)
    draws = np.stack([engine.folds(labels, 5, seed) for seed in range(2000)])
    assert np.abs((draws == 0).mean(0) - 0.2).max() < 4.5 * np.sqrt(0.2 * 0.8 / 2000)  # every row, every fold
    together = (draws[:, 0] == draws[:, 1]).mean()  # two rows of a class: 9 others of 49 share the fold
    assert together == pytest.approx(9 / 49, abs=4.5 * np.sqrt(0.2 * 0.8 / 2000))


def test_unit():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(engine.unit(x), torch.tensor([i / 255 for i in range(256)]))
    features = torch.randn(3, 2)
    assert engine.unit(features) is features


@pytest.mark.parametrize("block", [1, 7, 50, 512])
def test_evaluate_is_the_plain_forward(few, cpu, block):
    """In order, in evaluation mode, without a gradient; whatever the block."""
    backbone = cpu.put(backbones.build("resnet18", 4, few.images, seed=0))
    backbone(few.images[:64] / 255)  # running statistics of its own
    backbone.eval()
    images = few.images[:50]
    with torch.no_grad():
        expected = torch.cat([backbone(image[None] / 255) for image in images])
    backbone.train()
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    found = engine.evaluate(backbone, images, cpu, block)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad and not backbone.training
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


def test_evaluate_keeps_the_order_of_features(cpu):
    features = torch.randn(1000, 3)
    assert torch.equal(engine.evaluate(nn.Identity(), features, cpu, block=33), features)


def test_evaluate_in_bfloat16_returns_float32():
    place, features = engine.place("cpu", "bfloat16"), torch.randn(20, 8)
    linear = nn.Linear(8, 4)
    found = engine.evaluate(linear, features, place)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, linear(features).detach(), rtol=0.05, atol=0.05)
    assert not torch.equal(found, linear(features))
