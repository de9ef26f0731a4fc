"""The same work on CUDA: run with `pytest -m gpu` on a machine that has one."""

import numpy as np
import pytest
import torch
from synthetic import planted

from ptglab.detect import neighbours
from ptglab.train import augment, backbones, engine, finetune, losses, optim, predict, pretrain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


SMALL = {"batch_size": 32, "augmentation": "digits", "projection": 16}


@pytest.fixture
def exact():
    """Products in float32, not in TF32."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def test_auto_chooses_cuda_with_bfloat16():
    place = engine.place()
    assert place.device.type == "cuda" and place.precision == "bfloat16"


@pytest.mark.parametrize("preset", augment.PRESETS)
def test_augmentation_equals_the_cpu(preset):
    x = torch.rand(16, 3, 32, 32)
    for recipe in augment.preset(preset):
        drawn = augment.draw(recipe, x.shape, torch.Generator().manual_seed(0))
        on_gpu = augment.apply(x.cuda(), {k: None if v is None else v.cuda() for k, v in drawn.items()})
        torch.testing.assert_close(on_gpu.cpu(), augment.apply(x, drawn), atol=2e-3, rtol=0)  # tf32 products


@pytest.mark.parametrize("loss", [losses.nt_xent, losses.barlow_twins, losses.vicreg])
def test_losses_equal_the_cpu(loss):
    z1, z2 = torch.randn(64, 32), torch.randn(64, 32)
    torch.testing.assert_close(loss(z1.cuda(), z2.cuda()).cpu(), loss(z1, z2), rtol=1e-3, atol=1e-3)


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


@pytest.mark.slow
def test_compiled_step_equals_plain(few, exact):
    """Loss and gradients of SimCLR on the same views; two networks, compiled once.

    They are float64: in float32 rounding moves activations across the kinks of ReLU, and gradients by 1 %.
    """
    place = engine.place("cuda", "float32", compile_from=0)
    views = augment.two_views(few.images[:64].cuda(), "digits", engine.generator("cuda", 0))
    x = place.batch(torch.cat(views))
    torch._dynamo.reset()
    counts, made = torch._dynamo.utils.counters["stats"], []
    counts.clear()
    for seed in (0, 1):
        found = []
        for forward in (engine.forward, place.compiled(engine.forward, 1)):
            backbone = backbones.build("resnet18", 16, few.images, seed)
            network = place.put(torch.nn.Sequential(backbone, backbones.projector(128, 64, 64, 2, seed))).double()
            loss = losses.nt_xent(*forward(network, x).chunk(2), temperature=0.2)
            loss.backward()
            found.append((loss.item(), {name: p.grad for name, p in network.named_parameters()}))
        (plain, expected), (compiled, gradients) = found
        assert compiled == pytest.approx(plain, rel=1e-4)
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
        made.append(counts["unique_graphs"])
    assert made[0] == made[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 24])
def test_compiled_augmentation_equals_plain(exact, size):
    change = engine.place("cuda", "float32", compile_from=0).compiled(augment.apply, 1)
    x = torch.rand(16, 3, 32, 32, device="cuda")
    for recipe in augment.preset("vicreg"):
        drawn = augment.draw(recipe, x.shape, engine.generator("cuda", 0))
        expected = augment.apply(x, drawn, size)
        changed = change(x, drawn, size)
        torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)
        assert changed.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def unwaiting(monkeypatch):
    """From the second step to the last but one, waiting for the device is an error; return when those steps are."""
    rate = optim.set_learning_rate
    switched = []

    def begin(steps: int) -> list[str]:
        calls = []

        def set_learning_rate(optimizer, factor):
            calls.append(factor)
            if len(calls) in (2, steps):
                mode = "error" if len(calls) == 2 else "default"
                torch.cuda.set_sync_debug_mode(mode)
                switched.append(mode)
            rate(optimizer, factor)

        monkeypatch.setattr(optim, "set_learning_rate", set_learning_rate)
        return switched

    yield begin
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("method", pretrain.METHODS)
def test_pretraining_never_waits_within_an_epoch(few, unwaiting, method):
    switched = unwaiting(len(few) // 32)
    network = backbones.build("resnet18", 16, few.images, 0)
    next(pretrain.train(network, few.images, method, epochs=1, place=engine.place("cuda"), **SMALL))
    assert switched == ["error", "default"]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("mode", finetune.MODES)
def test_training_on_labels_never_waits_within_an_epoch(few, unwaiting, mode):
    switched = unwaiting(len(engine.batch_sizes(len(few), 32)))
    backbone = backbones.build("resnet18", 16, few.images, 0)
    head = backbones.head(backbone.num_features, 10)
    options = {"epochs": 1, "batch_size": 32, "validation": 0, "augmentation": "weak_digits"}
    next(finetune.train(backbone, head, few.images, few.labels_given, mode=mode, place=engine.place("cuda"), **options))
    assert switched == ["error", "default"]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_waiting_would_be_noticed(unwaiting):
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.arange(5).to("cuda")


def test_streamed_images_train_as_resident_ones(few, monkeypatch):
    """Each batch is gathered in pinned memory when the GPU may hold none of the images, and never otherwise.

    The batches are the same ones; losses are not compared, since two runs on a GPU differ in rounding.
    """
    place, pinned, gathered, seen = engine.place("cuda", "float32"), engine._pinned, [], []
    learn = engine.within_memory

    def gather(inputs, index):
        rows = pinned(inputs, index)
        gathered.append(rows.is_pinned() and not inputs.is_cuda)
        return rows

    def step(function, batch, world):
        seen.append(batch.cpu())
        return learn(function, batch, world=world)

    monkeypatch.setattr(engine, "_pinned", gather)
    monkeypatch.setattr(engine, "within_memory", step)
    for share in (engine.RESIDENT_SHARE, 0):
        monkeypatch.setattr(engine, "RESIDENT_SHARE", share)
        network = backbones.build("resnet18", 16, few.images, 0)
        records = list(pretrain.train(network, few.images, "simclr", epochs=2, place=place, **SMALL))
        assert np.isfinite([r["loss"] for r in records]).all()
        assert gathered == [True] * (2 * (len(few) // 32) if share == 0 else 0)
    resident, streamed = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(resident) == 16 and all(map(torch.equal, resident, streamed))


def test_neighbours_of_an_array_are_those_of_the_cpu(exact):
    """Searched on the GPU; equally near rows may come in either order, so the index is judged by its cosines."""
    x = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    similarity, index = neighbours.nearest(x, 7)
    assert torch.cuda.max_memory_allocated() >= before + 4 * 500 * 500  # the similarities were there
    expected, _ = neighbours.nearest(torch.from_numpy(x), 7)
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose((unit[:, None] * unit[index]).sum(2), similarity, atol=1e-5)
    assert (index != np.arange(500)[:, None]).all()


def test_linear_heads_equal_the_cpu(exact):
    given, _, _, features = planted(n=600)
    labels = np.stack([given, given[::-1]])
    seen = np.random.default_rng(0).random(labels.shape) < 0.8
    found = predict.linear_heads(features, labels, 5, seen=seen, l2=10.0, device="cuda")
    for on_gpu, on_cpu in zip(found, predict.linear_heads(features, labels, 5, seen=seen, l2=10.0), strict=True):
        assert np.abs(on_cpu).max() > 0.01
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3 * np.abs(on_cpu).max())


def test_images_take_their_own_size_of_memory():
    """As bytes, not as floats: alone, and in an epoch of pre-training on more of them."""
    place = engine.place("cuda", "float32")
    images = torch.randint(0, 256, (4096, 3, 64, 64), dtype=torch.uint8)

    def taken(call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak

    def train(rows: torch.Tensor) -> dict:
        options = {"epochs": 1, "batch_size": 64, "projection": 16, "place": place}
        return next(pretrain.train(backbones.build("resnet18", 8, images[:64], 0), rows, "simclr", **options))

    assert taken(lambda: place.resident(images)) == pytest.approx(images.nbytes, rel=0.05)
    train(images[:128])  # the search for the fastest convolutions takes memory, once
    more = taken(lambda: train(images)) - taken(lambda: train(images[:128]))
    assert more == pytest.approx(images[128:].nbytes, rel=0.25)
