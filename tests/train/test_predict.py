import numpy as np
import pytest
import torch
from expected import refused
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from synthetic import planted
from torch import nn

from ptglab.errors import InputError
from ptglab.train import backbones, engine, predict


def random_features(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.mark.parametrize(
    ("n", "k", "folds", "l2"), [(400, 3, 5, 100.0), (300, 6, 3, 1.0), (200, 4, 2, 10.0), (120, 10, 10, 30.0)]
)
def test_out_of_fold_is_sklearns_regression_fold_by_fold(n, k, folds, l2):
    """scikit-learn's objective is C times the summed loss plus half the squared norm: C = 1 / l2."""
    given, _, _, features = planted(n=n, k=k, rate=0.3, seed=n)
    features = features * np.float32(7) + np.linspace(-50, 50, 16, dtype=np.float32)  # any scale, any offset
    x = features.astype(np.float64)
    x = scaled(features)
    fold = engine.folds(given, folds, 3)
    expected = np.zeros((n, k))
    for f in range(folds):
        peer = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(x[fold != f], given[fold != f])
        assert list(peer.classes_) == list(range(k))
        expected[fold == f] = peer.predict_proba(x[fold == f])
    probs = predict.out_of_fold(features, given, k, folds=folds, seed=3, l2=l2)
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, expected, atol=1e-3)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)


def test_few_rows_are_shrunk_less():
    """By default a head's l2 is 100, but at most one a row."""
    given, _, _, features = planted(n=40, k=3, rate=0.2, seed=1)
    probs = predict.out_of_fold(features, given, 3)
    np.testing.assert_array_equal(probs, predict.out_of_fold(features, given, 3, l2=40.0))
    assert np.abs(probs - predict.out_of_fold(features, given, 3, l2=100.0)).max() > 0.02
    given, _, _, features = planted(n=130, k=3, rate=0.2, seed=1)
    np.testing.assert_array_equal(*(predict.out_of_fold(features, given, 3, **l2) for l2 in ({}, {"l2": 100.0})))


def test_out_of_fold_learns_nothing_from_labels_that_say_nothing():
    """Random labels that 300 dimensions can memorise: in sample a head knows them all, out of fold none."""
    features, labels = random_features(250, 300), np.random.default_rng(1).integers(0, 5, 250)
    x = (features - features.mean(0)) / features.std(0)
    assert LogisticRegression(C=1.0).fit(x, labels).score(x, labels) == 1
    probs = predict.out_of_fold(features, labels, 5, l2=1.0)
    assert abs((probs.argmax(1) == labels).mean() - 0.2) < 0.08  # three standard deviations
    assert abs(probs[np.arange(250), labels].mean() - 0.2) < 0.05


@pytest.mark.parametrize("l2", [100.0, 10.0])
@pytest.mark.parametrize("changed", [0, 3])
def test_a_row_is_not_predicted_from_its_label(monkeypatch, changed, l2):
    """With the folds pinned, every label of one fold changes: that fold's probabilities stay, the others' move.

    The folds share nothing but the number of steps, which the slowest decides, so they stay to the solver's tolerance.
    """
    features, labels = random_features(250, 300), np.random.default_rng(1).integers(0, 5, 250)
    fold = np.arange(250) % 5
    monkeypatch.setattr(engine, "folds", lambda labels, number, seed: fold)
    before = predict.out_of_fold(features, labels, 5, l2=l2)
    after = predict.out_of_fold(features, np.where(fold == changed, (labels + 1) % 5, labels), 5, l2=l2)
    difference = np.abs(before - after).max(1)
    assert difference[fold == changed].max() < 5e-4
    assert np.median(difference[fold != changed]) > 0.05


@pytest.mark.parametrize(("share", "l2"), [(0.5, 100.0), (0.8, 5.0)])
def test_heads_learn_from_trusted_rows_only(share, l2):
    """scikit-learn's, fold by fold: every row is predicted, trusted or not, in the scale of all."""
    given, _, _, features = planted(n=300, k=4, rate=0.3, seed=2)
    trusted = np.random.default_rng(0).random(300) < share
    x, fold, expected = scaled(features), engine.folds(given, 5, 1), np.zeros((300, 4))
    for f in range(5):
        rows = (fold != f) & trusted
        peer = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(x[rows], given[rows])
        expected[fold == f] = peer.predict_proba(x[fold == f])
    probs = predict.out_of_fold(features, given, 4, seed=1, l2=l2, trusted=trusted)
    np.testing.assert_allclose(probs, expected, atol=1e-3)
    assert np.abs(probs - predict.out_of_fold(features, given, 4, seed=1, l2=l2)).max() > 0.02


def test_repeats_are_averaged():
    given, _, _, features = planted(n=120, k=3)
    both = np.stack([given, given[::-1]])
    one_by_one = [predict.out_of_fold(features, both, 3, seed=seed) for seed in (7, 1007, 2007)]
    together = predict.out_of_fold(features, both, 3, seed=7, repeats=3)
    np.testing.assert_allclose(together, np.mean(one_by_one, 0), atol=1e-5)
    assert abs(one_by_one[0] - one_by_one[1]).max() > 1e-3


def test_a_feature_that_never_changes_does_no_harm():
    given, _, _, features = planted(n=200, rate=0.2)
    with_constant = np.concatenate([features, np.full((200, 1), 3, np.float32)], 1)
    probs = predict.out_of_fold(with_constant, given, 5)
    np.testing.assert_allclose(probs, predict.out_of_fold(features, given, 5), atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [
        (np.zeros(20, int), 5, "only one class"),
        (np.arange(20) % 2, 21, "20 rows cannot be split into 21 folds: use 2 to 20"),
        (np.arange(20) % 2, 1, "20 rows cannot be split into 1 folds"),
    ],
)
def test_what_cannot_be_split_is_named(labels, folds, message):
    with pytest.raises(InputError, match=message):
        predict.out_of_fold(random_features(20, 4), labels, 2, folds=folds)


def test_features_of_other_rows_are_refused():
    with pytest.raises(InputError, match="features have 20 rows for 8 labels"):
        predict.out_of_fold(random_features(20, 4), np.arange(8) % 2, 2, folds=2)


def several_heads(k: int, n: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (features, labels [4, N], seen [4, N]): a noise rate and a share of the rows for each head."""
    _, true, _, features = planted(n=n, k=k, seed=k)
    draws = np.random.default_rng(k)
    labels = np.stack([np.where(draws.random(n) < rate, draws.integers(0, k, n), true) for rate in (0, 0.1, 0.3, 0.6)])
    return features, labels, draws.random((4, n)) < np.array([[0.5], [0.8], [0.3], [1]])


def softmax_heads(features: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = features.astype(np.float64) @ weight + bias[:, None]
    p = np.exp(logits - logits.max(2, keepdims=True))
    return p / p.sum(2, keepdims=True)


def scaled(features: np.ndarray) -> np.ndarray:
    x = features.astype(np.float64)
    return (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1).mean())


@pytest.mark.parametrize("l2", [1.0, 100.0])
@pytest.mark.parametrize("k", [2, 7])
def test_linear_heads_are_sklearns_regressions(k, l2):
    """Of two classes scikit-learn fits the difference w of the weights: |W|^2 is |w|^2 / 2 at the minimum."""
    features, labels, seen = several_heads(k)
    x, ours = scaled(features), {}
    for scale, offset in ((1, 0), (50, 7)):
        moved = features * np.float32(scale) + np.float32(offset)
        weight, bias = predict.linear_heads(moved, labels, k, seen=seen, l2=l2)
        assert weight.dtype == bias.dtype == np.float32 and weight.shape == (4, 16, k) and bias.shape == (4, k)
        ours[scale] = softmax_heads(moved, weight, bias)
    np.testing.assert_allclose(ours[50], ours[1], atol=1e-3)
    for head, rows in enumerate(seen):
        peer = LogisticRegression(C=(2 if k == 2 else 1) / l2, tol=1e-9, max_iter=10_000)
        peer.fit(x[rows], labels[head, rows])
        assert list(peer.classes_) == list(range(k))
        np.testing.assert_allclose(ours[1][head], peer.predict_proba(x), atol=1e-3)


@pytest.mark.parametrize("l2", [10.0, 100.0])
@pytest.mark.parametrize("k", [2, 5])
def test_a_head_is_the_same_alone(k, l2):
    features, labels, seen = several_heads(k)
    together = softmax_heads(features, *predict.linear_heads(features, labels, k, seen=seen, l2=l2))
    for head in range(4):
        alone = predict.linear_heads(features, labels[head], k, seen=seen[head : head + 1], l2=l2)
        np.testing.assert_allclose(softmax_heads(features, *alone)[0], together[head], atol=3e-4)
    assert min(np.abs(together[i] - together[i - 1]).max() for i in range(4)) > 0.05


@pytest.mark.parametrize(("folds", "l2"), [(2, 100.0), (5, 100.0), (3, 10.0)])
def test_versions_of_the_labels_are_predicted_as_one_by_one(folds, l2):
    features, labels, _ = several_heads(4)
    probs = predict.out_of_fold(features, labels, 4, folds=folds, seed=2, l2=l2)
    assert probs.dtype == np.float32 and probs.shape == (4, 240, 4)
    for ours, version in zip(probs, labels, strict=True):
        alone = predict.out_of_fold(features, version, 4, folds=folds, seed=2, l2=l2)
        assert alone.shape == (240, 4)
        np.testing.assert_allclose(ours, alone, atol=3e-4)
    one = predict.out_of_fold(features, labels[:1], 4, folds=folds, seed=2, l2=l2)
    assert one.shape == (1, 240, 4)


@pytest.mark.parametrize("elements", [1, 999, 5000])
def test_blocks_of_any_size_give_the_same_heads(monkeypatch, elements):
    """A row at a time, an uneven number of rows, or a last block shorter than the rest."""
    features, labels, seen = several_heads(5, n=110)
    expected = softmax_heads(features, *predict.linear_heads(features, labels, 5, seen=seen))
    monkeypatch.setattr(predict, "BLOCK_ELEMENTS", elements)
    ours = softmax_heads(features, *predict.linear_heads(features, labels, 5, seen=seen))
    np.testing.assert_allclose(ours, expected, atol=3e-4)


TWO, THREE = np.arange(20) % 2, np.arange(20) % 3


@pytest.mark.parametrize("call", [predict.linear_heads, predict.out_of_fold])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (TWO * 0 + 1, ["only one class"]),
        (np.stack([TWO, TWO * 0, TWO]), ["only one class"]),
        (THREE, ["run from 0 to 2", "between 0 and 1"]),
        (np.stack([TWO, THREE]), ["run from 0 to 2", "between 0 and 1"]),
        (TWO - 1, ["run from -1 to 0", "between 0 and 1"]),
        (np.stack([TWO, TWO, TWO - 1]), ["run from -1 to 1", "between 0 and 1"]),
    ],
)
def test_labels_no_head_can_learn_are_named(call, labels, words):
    refused(*words, call=call)(random_features(20, 4), labels, 2)


def test_read_only_arrays_are_taken_silently():
    """Arrays of a run folder are read-only memory maps, of which torch warns once a process; here each time."""
    given, _, _, features = planted(n=100)
    given.flags.writeable = features.flags.writeable = False
    torch.set_warn_always(True)
    try:
        assert np.isfinite(predict.out_of_fold(features, given, 5)).all()
    finally:
        torch.set_warn_always(False)


@pytest.fixture(scope="module")
def backbone(few) -> backbones.ResNet:
    """Width 8, batch norm statistics no longer those of a new network."""
    network = backbones.build("resnet18", 8, few.images, 0).train()
    with torch.no_grad():
        network(few.images[:64].float() / 255)
    return network


def test_features_are_the_direct_forward_in_order(backbone, digits, cpu):
    images = digits.images[:530]  # more than a block
    ours = predict.features(backbone.train(), images, cpu)
    backbone.eval()
    with torch.no_grad():
        direct = np.concatenate([backbone(image[None].float() / 255) for image in images[::10]])
    assert ours.dtype == np.float32 and ours.shape == (530, backbone.num_features)
    np.testing.assert_allclose(ours[::10], direct, atol=1e-4)
    assert np.abs(np.diff(direct, axis=0)).max(1).min() > 0.01  # the rows do differ


def test_features_fill_the_array_they_are_given_a_block_at_a_time(backbone, few, cpu, monkeypatch):
    monkeypatch.setattr(predict, "BLOCK_ROWS", 100)  # 256 images are three blocks
    into = np.full((256, backbone.num_features), np.nan, np.float32)
    assert predict.features(backbone, few.images, cpu, into) is into
    np.testing.assert_allclose(into, predict.features(backbone, few.images, cpu), atol=1e-5)
    monkeypatch.setattr(predict, "BLOCK_ROWS", 256)
    np.testing.assert_allclose(into, predict.features(backbone, few.images, cpu), atol=1e-5)


def test_probabilities_are_the_direct_softmax(backbone, few, cpu):
    head = backbones.head(backbone.num_features, 10)
    nn.init.normal_(head[1].weight)
    ours = predict.probabilities(backbone, head, few.images, cpu)
    with torch.no_grad():
        logits = head.eval()(backbone.eval()(few.images.float() / 255)).numpy().astype(np.float64)
    direct = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, direct, atol=1e-4)
    cached = torch.as_tensor(predict.features(backbone, few.images, cpu))
    np.testing.assert_allclose(predict.probabilities(nn.Identity(), head, cached, cpu), ours, atol=1e-5)


@pytest.mark.parametrize("rows", [7, 100, 1 << 16])
def test_features_larger_than_memory_give_the_same_probabilities(monkeypatch, tmp_path, rows):
    """Mapped to a file, none of them held, read a few rows at a time."""
    given, _, _, features = planted(n=300)
    np.save(tmp_path / "features.npy", 3 + 0.1 * features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    expected = predict.out_of_fold(mapped, given, 5, repeats=2)
    for name, value in {"HELD": 0, "BLOCK_ROWS": rows, "BLOCK_ELEMENTS": 5000}.items():
        monkeypatch.setattr(predict, name, value)
    read = []

    class Watched:
        shape = mapped.shape

        def __getitem__(self, part):
            read.append(len(mapped[part]))
            return mapped[part]

    np.testing.assert_allclose(predict.out_of_fold(Watched(), given, 5, repeats=2), expected, atol=1e-5)
    assert max(read) == min(300, max(rows, 5000 // 50))


def test_principal_components_are_sklearns_but_for_their_scale():
    """Distances stay what they are: components are not whitened; all of them together have a variance of 1."""
    features = random_features(300, 20) * np.linspace(1, 9, 20, dtype=np.float32) + 5
    mean, directions = predict.principal(features, 6)
    ours = np.empty((300, 6), np.float32)
    predict.projected(features, mean, directions, ours)
    theirs = PCA(6).fit_transform(features.astype(np.float64))
    theirs /= np.sqrt(theirs.var(0).sum())
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)  # the sign of a direction is free
    assert predict.principal(features[:5], 6)[1].shape == (20, 4)  # five rows span four directions
    assert np.isfinite(predict.principal(np.ones((9, 3), np.float32), 6)[1]).all()


def test_small_directions_do_not_drown_the_large_ones():
    """60 rows in 59 directions, of which four tell the class: standardised, all rows would be equally far apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 4
    x = rng.normal(size=(60, 59)) * 0.2
    x[:, :4] += 2 * np.eye(4)[labels]
    mean, directions = predict.principal(x.astype(np.float32), 256)
    projected = np.empty((60, directions.shape[1]), np.float32)
    predict.projected(x.astype(np.float32), mean, directions, projected)
    assert (predict.out_of_fold(projected, labels, 4).argmax(1) == labels).mean() > 0.95


def test_images_may_come_in_batches():
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone = backbones.build("resnet18", 2, images, 0)
    into = np.empty((10, 16), np.float32)
    assert predict.features(backbone, iter(images.split(3)), into=into) is into
    np.testing.assert_allclose(into, predict.features(backbone, images), atol=1e-5)
