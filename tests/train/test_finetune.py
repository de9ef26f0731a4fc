import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from expected import refused
from safetensors import safe_open
from synthetic import planted
from torch import nn

from ptglab.data import noise
from ptglab.detect.label_errors import Suspects
from ptglab.errors import InputError
from ptglab.lab import metrics
from ptglab.train import augment, backbones, engine, finetune, optim

CLASSES = 10


@pytest.fixture
def network(few):
    """Return (backbone, head), the same at every call with the same seed.

    Width 16: below, oneDNN writes past its memory in the backward of a channels-last 1x1 convolution of stride 2
    where the threads do not share a batch evenly (github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def start(seed: int = 0) -> tuple[nn.Module, nn.Module]:
        backbone = backbones.build("resnet18", 16, few.images, seed)
        return backbone, backbones.head(backbone.num_features, CLASSES)

    return start


def small(n: int = 83, k: int = 4, seed: int = 0) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Return (features, labels_given, labels_true) of the planted problem, 30 % wrong."""
    given, true, _, features = planted(n=n, k=k, rate=0.3, seed=seed)
    return torch.as_tensor(features), given, true


def state(*modules: nn.Module) -> list[torch.Tensor]:
    return [v.clone() for module in modules for v in module.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def fit(cpu, inputs, labels, k: int = 4, **options) -> tuple[nn.Module, list[dict]]:
    """Train a head on features; return (head, records)."""
    head = backbones.head(inputs.shape[1], k)
    options = dict(mode="linear", epochs=3, batch_size=16, place=cpu) | options
    if decay := options.pop("ema_decay", 0):
        options["average"] = finetune.ema(nn.Identity(), head, decay)
    if "score" in options:
        keep = {"keep_fraction": options.pop("keep_fraction")} if "keep_fraction" in options else {}
        options["rows"] = finetune.curriculum(labels, options.pop("score"), options["epochs"], **keep)
    return head, list(finetune.train(nn.Identity(), head, inputs, labels, **options))


def slow_linear(x, y, k: int, epochs: int, batch_size: int, seed: int, validation: float, q=0, ema_decay=0, taken=None):
    """Train a head literally, in float64: return (weight, bias, losses [E], margins [E, N]).

    q: of generalised cross entropy, 0: cross entropy. taken: the rows of each epoch, otherwise all but the held out.
    """
    held_out = engine.folds(y, round(1 / validation), seed) == 0
    taken = taken or [np.flatnonzero(~held_out).tolist()] * epochs
    steps = [math.ceil((len(rows) - 1) / batch_size) for rows in taken]
    weight, bias, averaged = np.zeros((k, x.shape[1])), np.zeros(k), None
    momenta, running_mean, running_var = None, np.zeros(x.shape[1]), np.ones(x.shape[1])
    step, losses, history = 0, [], np.zeros((epochs, len(y)))

    def margin(logits: np.ndarray, label: int) -> float:
        return logits[label] - max(v for c, v in enumerate(logits) if c != label)

    for epoch in range(epochs):
        total = 0.0
        order = engine.generator("cpu", seed, epoch, "order")
        for batch in engine.shuffled_batches(torch.tensor(taken[epoch]), batch_size, order, least=2):
            warmup = steps[0] * min(5, max(1, epochs // 10))
            rate = 0.01 * batch_size / 128 * optim.warmup_cosine(step, sum(steps), warmup)
            a, b = x[batch.numpy()], y[batch.numpy()]
            running_mean = 0.9 * running_mean + 0.1 * a.mean(0)
            running_var = 0.9 * running_var + 0.1 * a.var(0, ddof=1)
            a = (a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)
            logits = a @ weight.T + bias
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            own = p[np.arange(len(b)), b]
            total += ((1 - own**q) / q if q else -np.log(own)).sum()
            for j, row in enumerate(batch.tolist()):
                history[epoch, row] = margin(logits[j], b[j])
            residual = own[:, None] ** q * (p - np.eye(k)[b]) / len(b)
            gradients = [residual.T @ a + 5e-4 * weight, residual.sum(0)]  # no decay of the bias
            momenta = gradients if momenta is None else [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
            weight = weight - rate * (gradients[0] + 0.9 * momenta[0])  # Nesterov
            bias = bias - rate * (gradients[1] + 0.9 * momenta[1])
            now = [weight, bias, running_mean, running_var]
            decay = min(ema_decay, (1 + step) / (10 + step)) if step else 0
            averaged = [decay * a + (1 - decay) * b for a, b in zip(averaged or now, now, strict=True)]
            step += 1
        losses.append(total / len(taken[epoch]))
        final = averaged if ema_decay else now
        for row in set(range(len(y))) - set(taken[epoch]):
            z = (x[row] - final[2]) / np.sqrt(final[3] + 1e-5)
            history[epoch, row] = margin(final[0] @ z + final[1], y[row])
    return final[0], final[1], losses, history


def slow_curriculum(rows: list[int], labels, score, share: float) -> list[int]:
    """Return the rows an epoch trains on: of each class the best, rounded up."""
    taken = []
    for label in set(labels[rows].tolist()):
        own = sorted((row for row in rows if labels[row] == label), key=lambda row: -score[row])
        taken += own[: math.ceil(share * len(own))]
    return sorted(taken)


OPTIONS = [
    {},
    {"ema_decay": 0.8},
    {"keep_fraction": (0.2, 0.7)},
    {"loss": "gce", "ema_decay": 0.3, "keep_fraction": (0.5, 1)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("batch_size", "validation", "epochs"), [(16, 0.25, 4), (100, 0.1, 20), (13, 0.5, 2)])
def test_linear_is_slow_literal_sgd(cpu, batch_size, validation, epochs, options):
    x, labels, _ = small()
    history = np.full((epochs, len(x)), np.nan, np.float32)
    held_out = engine.folds(labels, round(1 / validation), 5) == 0
    taken = [np.flatnonzero(~held_out).tolist()] * epochs
    if "keep_fraction" in options:
        score = np.random.default_rng(1).integers(0, 20, len(x))  # with ties
        shares = np.linspace(*options["keep_fraction"], epochs)
        taken = [slow_curriculum(taken[0], labels, score, share) for share in shares]
        assert len(taken[0]) < len(taken[-1])
        options = options | {"score": score}
    head, records = fit(cpu, x, labels, epochs=epochs, batch_size=batch_size, validation=validation, seed=5,
                        history=history, **options)  # fmt: skip
    literal = {"q": 0.7 if "loss" in options else 0, "ema_decay": options.get("ema_decay", 0), "taken": taken}
    slow = slow_linear(x.numpy().astype(np.float64), labels, 4, epochs, batch_size, 5, validation, **literal)
    np.testing.assert_allclose(head[1].weight.detach(), slow[0], atol=1e-5)
    np.testing.assert_allclose(head[1].bias.detach(), slow[1], atol=1e-5)
    np.testing.assert_allclose([record["loss"] for record in records], slow[2], rtol=1e-4)
    np.testing.assert_allclose(history, slow[3], atol=1e-4)
    for record, margins, rows in zip(records, slow[3], taken, strict=True):
        assert record["accuracy_train"] == pytest.approx((margins[rows] > 1e-6).mean())
        assert record["accuracy_validation"] == pytest.approx((margins[held_out] > 1e-6).mean())


OURS = [name for name, row in finetune.MODES.items() if not row.epochs]  # whose batches may have any size
RECORD = {"epoch", "loss", "learning_rate", "seconds", "accuracy_train"}


@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize(
    ("validation", "test", "more"),
    [(0.1, True, {"accuracy_validation", "accuracy_test"}), (0.1, False, {"accuracy_validation"}), (0, False, set())],
)
def test_records_are_as_documented(few, cpu, network, mode, validation, test, more):
    options = {"test": (few.images[64:96], few.labels_true[64:96])} if test else {}
    records = list(
        finetune.train(*network(), few.images[:64], few.labels_given[:64], mode=mode, epochs=2, batch_size=32,
                       place=cpu, validation=validation, **options)
    )  # fmt: skip
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert record.keys() == RECORD | more
        assert all(type(value) in (int, float) and math.isfinite(value) for value in record.values())
        assert all(0 <= record[name] <= 1 for name in record if name.startswith("accuracy"))


def test_linear_leaves_the_backbone_untouched_and_the_others_do_not(few, cpu, network):
    """Bit for bit, with the statistics of its batch norms."""
    for mode in OURS:
        backbone, head = network()
        before = state(backbone)
        list(finetune.train(backbone.train(), head, few.images[:64], few.labels_given[:64], mode=mode, epochs=1,
                            batch_size=32, place=cpu))  # fmt: skip
        assert same(state(backbone), before) == (mode == "linear")
        means = [v for k, v in backbone.state_dict().items() if k.endswith("bn1.running_mean")]
        assert all(mean.any() for mean in means) == (mode != "linear")
        assert head[1].weight.any()
        filters = dict(backbone.named_parameters())["layer1.0.conv1.weight"]
        assert (filters.grad is None) == (mode == "linear")


@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("validation", [0, 0.25])
def test_history_holds_every_margin(few, cpu, network, mode, validation):
    """Its sign says what the accuracies count; held-out rows have theirs after the epoch, from the network as it is."""
    images, labels = few.images[:80], few.labels_given[:80]
    backbone, head = network()
    history = np.full((3, 80), np.nan, np.float32)
    records = list(finetune.train(backbone, head, images, labels, mode=mode, epochs=3, batch_size=32, place=cpu,
                                  validation=validation, history=history))  # fmt: skip
    assert np.isfinite(history).all()
    held_out = engine.folds(labels, 4, 0) == 0 if validation else np.zeros(80, bool)
    for record, margins in zip(records, history, strict=True):
        assert record["accuracy_train"] == pytest.approx((margins[~held_out] > 0).mean())
        if validation:
            assert record["accuracy_validation"] == pytest.approx((margins[held_out] > 0).mean())
    assert 0 < records[-1]["accuracy_train"] < 1
    if validation:
        with torch.no_grad():
            logits = head.eval()(backbone.eval()(images[held_out].float() / 255))
        margins = finetune._margins(logits, torch.as_tensor(labels[held_out]))
        np.testing.assert_allclose(history[-1, held_out], margins, atol=1e-4)


def test_margins_over_epochs_point_at_planted_flips(cpu):
    """Area under the margin (Pleiss et al. 2020): a linear head cannot memorise what contradicts its neighbours."""
    x, given, true = small(n=600, k=5)
    history = np.zeros((8, 600), np.float32)
    _, records = fit(cpu, x, given, k=5, epochs=8, batch_size=32, history=history, test=(x, true))
    suspects = Suspects(history.mean(0), np.zeros(600, bool), given)
    assert metrics.detection(suspects, given != true)["auroc"] > 0.97
    assert records[-1]["accuracy_test"] > 0.95
    assert records[-1]["accuracy_train"] < 0.75  # of labels of which 30 % are wrong


def test_held_out_rows_are_never_trained_on(cpu, monkeypatch):
    """With the folds pinned, other labels and other inputs of the held-out rows leave the weights as they are."""
    x, labels, _ = small()
    fold = np.arange(len(x)) % 10
    monkeypatch.setattr(engine, "folds", lambda labels, number, seed: fold)
    history = np.zeros((2, 3, len(x)), np.float32)
    head, records = fit(cpu, x, labels, history=history[0])
    out = torch.as_tensor(fold == 0)
    other_labels = np.where(out, (labels + 1) % 4, labels)
    other_x = torch.where(out[:, None], 100 * torch.ones_like(x), x)
    changed, other_records = fit(cpu, other_x, other_labels, history=history[1])
    assert same(state(changed), state(head))
    assert [r["loss"] for r in other_records] == [r["loss"] for r in records]
    np.testing.assert_array_equal((history[0] != history[1]).all(0), fold == 0)
    np.testing.assert_array_equal((history[0] != history[1]).any(0), fold == 0)
    labels[1] = (labels[1] + 1) % 4  # a row that is trained on
    assert not same(state(fit(cpu, x, labels)[0]), state(head))


@pytest.mark.parametrize("stop", [3])
@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize(
    ("mode", "augmentation"), [("linear", None), ("light", "weak_digits"), ("full", "weak"), ("paper", "weak_shift")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(few, cpu, network, tmp_path, mode, augmentation, decay, stop):
    """Bit for bit: weights, batch norm statistics, records, margins; it goes on from a network of other weights.

    The epoch that was recorded when the run stopped is run and recorded again.
    """
    path = tmp_path / "checkpoint.safetensors"
    history = np.lib.format.open_memmap(tmp_path / "history.npy", "w+", np.float32, (2, 3, 70))

    def records(modules, **options):
        if decay:
            score = np.sin(np.arange(70))
            options |= {"average": finetune.ema(*modules, decay),
                        "rows": finetune.curriculum(few.labels_given[:70], score, 3)}  # fmt: skip
        options |= {"batch_size": 32} if mode in OURS else {}
        return finetune.train(*modules, few.images[:70], few.labels_given[:70], mode=mode, epochs=3, place=cpu, seed=4,
                              augmentation=augmentation, **options)  # fmt: skip

    straight = network()
    expected = list(records(straight, history=history[0]))
    interrupted = records(network(), history=history[1], checkpoint=path)
    found = [next(interrupted) for _ in range(stop)]
    interrupted.close()
    torch.manual_seed(stop)
    resumed = network(seed=0 if mode == "linear" else 1)
    again = list(records(resumed, history=history[1], checkpoint=path))
    assert again[0]["epoch"] == stop
    found = found[: stop - 1] + again
    assert timeless(found) == timeless(expected)
    assert same(state(*resumed), state(*straight))
    np.testing.assert_array_equal(history[1], history[0])
    assert list(records(network(), checkpoint=path)) == []  # nothing is left to do


@pytest.mark.parametrize(("mode", "epochs", "batches"), [("full", 2, 4), ("full", 1, 0), ("linear", 9, 0)])
def test_whole_batches_are_compiled_in_long_runs_of_the_backbone(few, network, monkeypatch, mode, epochs, batches):
    """70 rows in batches of 32, 32 and 6: the last has another size, for which code would be compiled again."""
    sizes = []

    def compiled(function):
        return lambda *args: sizes.append((function.__name__, len(args[-1]))) or function(*args)

    monkeypatch.setattr(engine, "_compiled", compiled)
    options = dict(epochs=epochs, batch_size=32, validation=0, place=engine.place("cpu", compile_from=6))
    list(finetune.train(*network(), few.images[:70], few.labels_given[:70], mode=mode, **options))
    assert sizes == [("forward", 32)] * batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "liner"}, "unknown mode 'liner': did you mean 'linear'"),
        ({"mode": "paper"}, "mode 'paper' has batch_size 256, but batch_size is 16"),
        ({"mode": "paper", "batch_size": None, "loss": "gce"}, "has loss cross_entropy, but loss is gce"),
        ({"losss": "gce"}, "unknown option of training 'losss': did you mean 'loss'"),
        ({"loss": "gec"}, "unknown loss 'gec': did you mean 'gce'"),
        ({"loss": "crossentropy"}, "unknown loss 'crossentropy': did you mean 'cross_entropy'"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_decay": float("nan")}, "ema_decay is nan"),
        ({"score": np.zeros(3)}, "score has 3 values for 83 rows"),
        ({"score": np.full(83, np.nan)}, "some are not finite"),
        ({"score": np.zeros(83), "keep_fraction": (0.0, 1.0)}, "keep_fraction is"),
        ({"score": np.zeros(83), "keep_fraction": (0.3, 1.1)}, "keep_fraction is"),
        ({"augmentation": "weak_digit"}, "unknown augmentation 'weak_digit': did you mean 'weak_digits'"),
        ({"labels": np.full(83, 2)}, "only one class"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"epochs": 0}, "epochs 0"),
        ({"validation": 0.7}, "validation is 0.7"),
        ({"validation": -0.1}, "validation is -0.1"),
        ({"rows": 2, "labels": np.arange(2)}, "nothing to train: 1 rows beside 1 held out"),
    ],
)
def test_what_cannot_be_trained_is_named(cpu, options, message):
    x, labels, _ = small()
    options = {"labels": labels} | options
    x = x[: options.pop("rows", None)]
    with pytest.raises(InputError, match=message) as error:
        fit(cpu, x, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_names_its_epoch(cpu, tmp_path, bad):
    x, labels, _ = small()
    path = tmp_path / "checkpoint.safetensors"
    steps = finetune.train(nn.Identity(), backbones.head(16, 4), x, labels, mode="linear", epochs=3, place=cpu,
                           validation=0, checkpoint=path)  # fmt: skip
    next(steps)
    x[3, 0] = bad
    with pytest.raises(FloatingPointError, match=f"not finite in epoch 2; the last good state is {path}"):
        next(steps)
    with safe_open(path, "pt") as kept:
        assert kept.metadata()["epoch"] == "1"
    with pytest.raises(FloatingPointError, match="not finite in epoch 1; nothing was kept"):
        fit(cpu, x, labels, validation=0)


@pytest.mark.parametrize("trusted", [None, np.random.default_rng(3).random(83) < 0.6], ids=["all", "some"])
@pytest.mark.parametrize("folds", [2, 3])
def test_cross_fit_predicts_each_row_by_a_network_that_never_saw_its_label(cpu, monkeypatch, folds, trusted):
    """Every row and label that a network is trained with, and every row it predicts, is written down."""
    x, labels, _ = small()
    untrusted = [] if trusted is None else np.flatnonzero(~trusted).tolist()
    number = {tuple(row): i for i, row in enumerate(x.tolist())}
    trained, predicted = {}, defaultdict(list)

    def train(backbone, head, inputs, labels_given, original=finetune.train, **options):
        trained[head] = [number[tuple(row)] for row in inputs.tolist()]
        np.testing.assert_array_equal(labels_given, labels[trained[head]])
        return original(backbone, head, inputs, labels_given, **options)

    def evaluate(module, inputs, place, original=engine.evaluate):
        predicted[module[-1]] += [number[tuple(row)] for row in inputs.tolist()]
        return original(module, inputs, place)

    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(engine, "evaluate", evaluate)

    def start() -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), backbones.head(16, 4)

    probs = np.full((len(x), 4), np.nan, np.float32)
    options = dict(mode="linear", epochs=2, batch_size=16, seed=3, place=cpu, trusted=trusted)
    records = list(finetune.cross_fit(start, x, labels, probs, folds=folds, **options))
    assert [(r["fold"], r["epoch"]) for r in records] == [(i // 2, i + 1) for i in range(2 * folds)]
    assert all(record.keys() == RECORD | {"fold"} for record in records)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    assert len(trained) == folds and trained.keys() == predicted.keys()
    for head, rows in trained.items():
        assert not set(rows) & set(predicted[head])
        assert set(rows) == set(range(len(x))) - set(predicted[head]) - set(untrusted)
        with torch.no_grad():
            direct = head.eval()(x[predicted[head]]).softmax(1)
        np.testing.assert_allclose(probs[predicted[head]], direct, atol=1e-6)
    assert sorted(sum(predicted.values(), [])) == list(range(len(x)))


@pytest.mark.parametrize("stopped", [1, 3, 4, 6])
def test_folds_that_were_interrupted_go_on_where_they_were(cpu, tmp_path, stopped):
    """Before a fold's last epoch, after it and at the end: no epoch is trained twice, and the result is the same."""
    x, labels, _ = small()
    found, trained = [np.full((83, 4), np.nan, np.float32) for _ in range(2)], []
    options = dict(mode="linear", epochs=3, batch_size=16, place=cpu)

    def start() -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), backbones.head(16, 4)

    list(finetune.cross_fit(start, x, labels, found[0], **options))
    for most in (stopped, 7):
        steps = finetune.cross_fit(start, x, labels, found[1], checkpoint=tmp_path / "c.safetensors", **options)
        for number, record in enumerate(steps, 1):
            trained.append(record["epoch"])
            if number == most:  # whose epoch is recorded, and not yet kept
                break
    assert trained == [*range(1, stopped + 1), *range(stopped, 7)]
    np.testing.assert_array_equal(found[1], found[0])


@pytest.mark.parametrize("option", [{"history": np.zeros((1, 83))}, {"validation": 0.1}, {"rows": max}])
def test_cross_fit_refuses_what_belongs_to_one_network(cpu, option):
    x, labels, _ = small()
    probs, options = np.zeros((83, 4), np.float32), dict(mode="linear", epochs=1, place=cpu)
    steps = finetune.cross_fit(lambda: (nn.Identity(), backbones.head(16, 4)), x, labels, probs, **options, **option)
    with pytest.raises(InputError, match=f"it takes no {next(iter(option))}"):
        next(steps)


def test_the_papers_supervised_step_item_by_item():
    """The whole network by Adam at a constant rate, all weights decayed; crop of 4 pixels' padding, and flip."""
    row = finetune.MODES["paper"]
    assert (row.optimizer, row.head, row.backbone, row.weight_decay) == (torch.optim.Adam, 1e-3, 1e-3, 1e-4)
    assert (row.rate, row.decay_all, row.batch_size, row.epochs) == (optim.constant, True, 256, 10)
    (view,) = set(augment.preset(row.views))
    assert (view.crop_scale, view.shift, view.flip, view.jitter) == ((1.0, 1.0), 4, 0.5, 0.0)
    assert (view.grey, view.blur, view.solarize) == (0.0, 0.0, 0.0)
    assert augment.for_dataset(row.views, "digits") == "weak_digits"


def test_the_papers_first_step_moves_every_weight_by_the_rate(few, cpu, network):
    """Of the backbone too, at a rate that stays; a bias whose gradient is clear moves like a filter."""
    (backbone, head), (start, _) = network(), network()
    records = list(finetune.train(backbone, head, few.images, few.labels_given, "paper", 1, place=cpu, validation=0))
    assert records[0]["learning_rate"] == 1e-3
    for after, before in zip(backbone.parameters(), start.parameters(), strict=True):
        assert (after - before).abs().max().item() <= 1.001e-3
    moved = head[1].bias.detach().abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


def test_the_papers_noise_never_keeps_a_label():
    """Uniform noise at its rate: every label that is drawn anew is another one, each as likely."""
    labels = np.arange(10).repeat(2000)
    for rate in (0.2, 0.8):
        given = noise.apply("uniform", labels, rate, 10, seed=0)
        assert (given != labels).mean() == pytest.approx(rate, abs=0.01)
    assert (noise.apply("uniform", labels, 1.0, 10, seed=0) != labels).all()
    refused("did you mean 'uniform'", call=noise.apply)("symmetric", labels, 0.4, 10, 0)
