import warnings

import numpy as np
import pytest
import torch
from conftest import planted
from sklearn.linear_model import LogisticRegression
from torch import nn

from ptglab import backbones, engine, predict
from ptglab.errors import InputError


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
    x = (x - x.mean(0)) / x.std(0, ddof=1)
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


def test_out_of_fold_keeps_the_order_of_rows():
    """Separable blobs, rows as they come: each row's most probable class is its own."""
    _, true, _, features = planted(n=300, rate=0)
    assert (predict.out_of_fold(features, true, 5).argmax(1) == true).mean() > 0.98


def test_out_of_fold_learns_nothing_from_labels_that_say_nothing():
    """Random labels that 300 dimensions can memorise: in sample a head knows them all, out of fold none."""
    features, labels = random_features(250, 300), np.random.default_rng(1).integers(0, 5, 250)
    x = (features - features.mean(0)) / features.std(0)
    assert LogisticRegression(C=1.0).fit(x, labels).score(x, labels) == 1
    probs = predict.out_of_fold(features, labels, 5, l2=1.0)
    assert abs((probs.argmax(1) == labels).mean() - 0.2) < 0.08  # three standard deviations
    assert abs(probs[np.arange(250), labels].mean() - 0.2) < 0.05


@pytest.mark.parametrize(("l2", "tolerance"), [(100.0, 1e-3), (1.0, 0.01)])
@pytest.mark.parametrize("changed", [0, 3])
def test_a_row_is_not_predicted_from_its_label(monkeypatch, changed, l2, tolerance):
    """With the folds pinned, every label of one fold changes: that fold's probabilities stay, the others' move.

    The folds are solved together and share the steps of the line search, so they stay to the solver's tolerance.
    """
    features, labels = random_features(250, 300), np.random.default_rng(1).integers(0, 5, 250)
    fold = np.arange(250) % 5
    monkeypatch.setattr(engine, "folds", lambda labels, number, seed: fold)
    before = predict.out_of_fold(features, labels, 5, l2=l2)
    after = predict.out_of_fold(features, np.where(fold == changed, (labels + 1) % 5, labels), 5, l2=l2)
    difference = np.abs(before - after).max(1)
    assert difference[fold == changed].max() < tolerance
    assert np.median(difference[fold != changed]) > 0.05


def test_out_of_fold_depends_on_its_seed_alone():
    given, _, _, features = planted(n=200, rate=0.4)
    first = predict.out_of_fold(features, given, 5, seed=1)
    torch.manual_seed(99)
    np.testing.assert_array_equal(predict.out_of_fold(features, given, 5, seed=1), first)
    assert not np.array_equal(predict.out_of_fold(features, given, 5, seed=2), first)


def test_a_class_of_one_image_is_predicted_by_a_head_that_never_saw_it():
    _, true, _, features = planted(n=200, k=3, rate=0)
    true[17] = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probs = predict.out_of_fold(features, true, 5)  # class 4 has no image at all
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    assert probs[17, 3] < 0.01 and probs[:, 4].max() < 0.05


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


def test_leaving_one_out_works():
    given, _, _, features = planted(n=40, k=2, rate=0)
    probs = predict.out_of_fold(features, given, 2, folds=40)
    assert (probs.argmax(1) == given).mean() > 0.9


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


def test_evaluation_changes_nothing_of_the_network(backbone, few, cpu):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    predict.features(backbone.train(), few.images, cpu)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
