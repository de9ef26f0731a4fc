"""Nearest neighbours against scikit-learn, their vote against a loop and lightly, their embedding against UMAP."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from expected import refused
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from ptglab.detect import neighbours


def data(n: int, d: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, size=(n, d)).astype(np.float32)


def peer(features, k, bank=None):
    """scikit-learn leaves each row itself out where it is asked about the rows it was given."""
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
    search.fit((features if bank is None else bank).astype(np.float64))
    distance, index = search.kneighbors(None if bank is None else features.astype(np.float64))
    return 1 - distance, index


@pytest.mark.parametrize("elements", [1, 997, 1 << 25], ids=lambda n: f"{n}_held")
@pytest.mark.parametrize("m", [None, 150, 7], ids=lambda m: f"bank_{m}")
@pytest.mark.parametrize("k", [1, 5])
def test_nearest_is_scikit_learns(monkeypatch, tmp_path, k, m, elements):
    """However many similarities are held at a time; a mapped file is read-only, of which PyTorch would warn."""
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", elements)
    np.save(tmp_path / "features.npy", data(203))
    features, bank = np.load(tmp_path / "features.npy", mmap_mode="r"), None if m is None else data(m, seed=1)
    similarity, index = neighbours.nearest(features, k, bank)
    expected_similarity, expected_index = peer(features, k, bank)
    assert similarity.dtype == np.float32 and index.dtype == np.int64
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(similarity, expected_similarity, atol=1e-5)
    for same in (torch.tensor(features), features.astype(np.float64) * np.arange(1, 204)[:, None]):  # of any length
        np.testing.assert_array_equal(neighbours.nearest(same, k, bank)[1], index)


def test_a_row_is_its_own_neighbour_only_in_a_bank():
    features = data(50)
    features[1] = features[0]  # duplicates find each other, not themselves
    similarity, index = neighbours.nearest(features, 49)
    assert all(i not in row for i, row in enumerate(index))
    assert (index[0, 0], index[1, 0]) == (1, 0) and similarity[0, 0] == pytest.approx(1)
    assert np.isfinite(similarity).all()
    assert (neighbours.nearest(features[2:], 1, features[2:])[1][:, 0] == np.arange(48)).all()


@pytest.mark.parametrize("bank, k, kept", [(None, 99, 9), (None, 9, 9), (4, 99, 4), (4, 2, 2)])
def test_k_is_cut_to_what_exists(bank, k, kept):
    similarity, index = neighbours.nearest(data(10), k, None if bank is None else data(bank, seed=1))
    assert similarity.shape == index.shape == (10, kept)
    assert all(len(set(row)) == kept for row in index)
    assert (np.diff(similarity, axis=1) <= 0).all()


def blobs(n: int, seed: int = 0) -> np.ndarray:
    """Return rows in clusters, as a network's features are."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(20, 8))[rng.integers(0, 20, n)] + rng.normal(0, 0.3, (n, 8))).astype(np.float32)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("bank", [None, 3000])
def test_the_index_finds_most_of_the_neighbours(monkeypatch, capsys, bank, tensor):
    pytest.importorskip("faiss")
    features, bank = blobs(4000), None if bank is None else blobs(bank, seed=1)
    if tensor:
        features, bank = torch.from_numpy(features), None if bank is None else torch.from_numpy(bank)
    exact_similarity, exact = neighbours.nearest(features, 20, bank)
    for name, value in {"INDEX_FROM": 100, "BLOCK_ROWS": 777, "LIST_ROWS": 64}.items():
        monkeypatch.setattr(neighbours, name, value)
    similarity, index = neighbours.nearest(features, 20, bank)
    assert similarity.dtype == np.float32 and index.dtype == np.int64 and index.shape == (4000, 20)
    assert neighbours.recall(index, exact) >= neighbours.RECALL - 0.03  # it was measured on a sample
    assert not (index == exact).all()  # it was not the exact search
    assert (np.diff(similarity, axis=1) <= 0).all() and (similarity <= exact_similarity + 1e-6).all()
    if bank is None:
        assert (index != np.arange(4000)[:, None]).all()
    assert "of the 20 nearest of 256 rows" in capsys.readouterr().err


def test_rows_that_the_index_finds_too_few_for_are_compared_with_all(monkeypatch, capsys):
    """Few lists of about 8 rows hold 20 neighbours and itself; the sample is content with any share of them."""
    pytest.importorskip("faiss")
    features = blobs(500)
    exact = neighbours.nearest(features, 20)[1]
    for name, value in {"INDEX_FROM": 10, "LIST_ROWS": 8, "TRAIN_ROWS": 8, "RECALL": 0.0, "FIRST_LISTS": 1}.items():
        monkeypatch.setattr(neighbours, name, value)
    index = neighbours.nearest(features, 20)[1]
    assert (index >= 0).all() and (index == exact).all(1).mean() > 0.95


def test_without_faiss_all_pairs_are_compared_and_faiss_is_recommended(monkeypatch, capsys):
    features, exact = data(300), neighbours.nearest(data(300), 5)
    monkeypatch.setattr(neighbours, "INDEX_FROM", 10)
    monkeypatch.setitem(sys.modules, "faiss", None)
    np.testing.assert_array_equal(neighbours.nearest(features, 5)[1], exact[1])
    assert "pip install 'ptglab[faiss]'" in capsys.readouterr().err


def test_the_first_of_those_that_were_found_before():
    features = data(30)
    found = neighbours.nearest(features, 9)
    for k in (1, 9):
        for ours, theirs in zip(neighbours.first_k(found, None, k), neighbours.nearest(features, k), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert neighbours.first_k(neighbours.nearest(features[:5], 9), None, 9)[1].shape == (5, 4)
    refused("neighbours", "10 are needed each", call=neighbours.first_k)(found, None, 10)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("k, num_classes", [(1, 2), (5, 3), (20, 10)])
def test_vote_is_the_slow_loop(monkeypatch, k, num_classes, temperature):
    """However many rows are counted at a time."""
    rng = np.random.default_rng(k)
    similarity, labels = rng.uniform(-1, 1, (80, k)), rng.integers(0, num_classes, (80, k))
    votes = neighbours.vote(similarity, labels, num_classes, temperature)
    for row, sims, given in zip(votes, similarity, labels, strict=True):
        weights = [math.exp(s / temperature) for s in sims]
        slow = [sum(w for w, y in zip(weights, given, strict=True) if y == c) for c in range(num_classes)]
        np.testing.assert_allclose(row, np.array(slow) / sum(weights), rtol=1e-5, atol=1e-7)
    assert votes.dtype == np.float32
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 7)
    np.testing.assert_array_equal(neighbours.vote(similarity, labels, num_classes, temperature), votes)


def test_vote_in_closed_form():
    """Equal neighbours count; one nearer by temperature x log 3 weighs three; far ones underflow to no zero sum."""
    votes = neighbours.vote(np.zeros((1, 4)), np.array([[0, 2, 2, 2]]), 4)
    np.testing.assert_allclose(votes, [[0.25, 0, 0.75, 0]])
    votes = neighbours.vote(np.array([[0.5 + 0.1 * math.log(3), 0.5]]), np.array([[1, 0]]), 2)
    np.testing.assert_allclose(votes, [[0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(neighbours.vote([[-1.0, -1.0]], np.array([[1, 0]]), 2, temperature=1e-4), [[0.5, 0.5]])


def test_nearest_and_vote_predict_what_lightly_does():
    from lightly.utils.benchmarking.knn import knn_predict

    features, bank, labels = data(100), data(300, seed=10), np.random.default_rng(0).integers(0, 6, 300)
    similarity, index = neighbours.nearest(features, 20, bank)
    votes = neighbours.vote(similarity, labels[index], 6)
    unit = [torch.nn.functional.normalize(torch.as_tensor(x), dim=1) for x in (features, bank)]
    theirs = knn_predict(unit[0], unit[1].T, torch.as_tensor(labels), num_classes=6, knn_k=20, knn_t=0.1)
    np.testing.assert_array_equal(votes.argmax(1), theirs[:, 0].numpy())


@pytest.fixture
def recorder(monkeypatch) -> dict:
    """Return what UMAP, which is replaced, is given; its first import warns that TensorFlow is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import umap
    given = {}

    class Recorder:
        def __init__(self, **options):
            given.update(options)

        def fit_transform(self, x):
            given["fitted"] = x
            return np.zeros((len(x), 2), np.float32)

    monkeypatch.setattr(umap, "UMAP", Recorder)
    return given


@pytest.mark.parametrize(("n", "k", "used"), [(40, 15, 15), (25, 4, 4), (15, 15, 14), (4, 15, 3)])
def test_the_embedding_is_drawn_from_the_nearest_by_cosine(recorder, n, k, used):
    """Of few rows it asks for fewer neighbours than rows: UMAP would warn, and take others than those it was given."""
    features = data(n, 6)
    assert neighbours.embedding(features, 3, k).shape == (n, 2)
    index, distance = recorder["precomputed_knn"][:2]
    assert recorder["n_neighbors"] == used and recorder["random_state"] == 3
    assert index.shape == distance.shape == (n, used) and distance.dtype == np.float32
    similarity, others = peer(features, used - 1)
    np.testing.assert_array_equal(index, np.c_[np.arange(n), others])
    np.testing.assert_array_equal(distance[:, 0], 0)
    np.testing.assert_allclose(distance[:, 1:], 1 - similarity, atol=1e-6)
    np.testing.assert_array_equal(recorder["fitted"], features)


def test_a_row_of_the_embedding_comes_before_its_duplicates(recorder):
    """Rounding makes a few of the similarities of equal rows more than 1; no distance is below 0."""
    features = np.repeat(data(30, 6), 2, axis=0)
    neighbours.embedding(features, 0, 4)
    index, distance = recorder["precomputed_knn"][:2]
    assert neighbours.nearest(features, 1)[0].max() > 1
    np.testing.assert_array_equal(index[:, :2], np.c_[np.arange(60), np.arange(60) ^ 1])
    assert distance.min() == 0 and distance[:, 1].max() < 1e-6


def test_the_embedding_keeps_neighbourhoods():
    """Digits of any length, so that the nearest by cosine are not the nearest by distance; read-only, as in a run."""
    rng = np.random.default_rng(0)
    features = (load_digits().data[:300] * 10 ** rng.uniform(-1, 1, (300, 1))).astype(np.float32)
    features.flags.writeable = False
    embedded = neighbours.embedding(features, 0)
    assert embedded.dtype == np.float32 and embedded.shape == (300, 2) and np.isfinite(embedded).all()
    np.testing.assert_array_equal(neighbours.embedding(features, 0), embedded)
    kept = trustworthiness(features, embedded, n_neighbors=15, metric="cosine")
    assert kept > 0.95  # UMAP by cosine without our neighbours .97, by distance .80
