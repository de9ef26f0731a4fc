"""Nearest neighbours against scikit-learn's, their vote against a loop and lightly's, their plane against UMAP's."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from ptglab.detect import neighbours
from ptglab.errors import InputError


def data(n: int, d: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, size=(n, d)).astype(np.float32)


def peer(features, k, bank=None):
    """scikit-learn leaves each row itself out where it is asked about the rows it was given."""
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
    search.fit((features if bank is None else bank).astype(np.float64))
    distance, index = search.kneighbors(None if bank is None else features.astype(np.float64))
    return 1 - distance, index


@pytest.mark.parametrize("elements", [1, 997, 10_000, 1 << 25], ids=lambda n: f"{n}_held")
@pytest.mark.parametrize("m", [None, 150, 7], ids=lambda m: f"bank_{m}")
@pytest.mark.parametrize("k", [1, 5])
def test_nearest_is_scikit_learns(monkeypatch, k, m, elements):
    """Whatever number of similarities is held at a time: one row's, a few rows', all."""
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", elements)
    features, bank = data(203), None if m is None else data(m, seed=1)
    similarity, index = neighbours.nearest(features, k, bank)
    expected_similarity, expected_index = peer(features, k, bank)
    assert similarity.dtype == np.float32 and index.dtype == np.int64
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(similarity, expected_similarity, atol=1e-5)


def test_nearest_takes_tensors_and_ignores_length():
    features = data(60)
    expected = neighbours.nearest(features, 4)
    lengths = np.random.default_rng(0).uniform(0.1, 9, (60, 1)).astype(np.float32)
    for same in (torch.as_tensor(features), features * lengths, features.astype(np.float64)):
        similarity, index = neighbours.nearest(same, 4)
        np.testing.assert_array_equal(index, expected[1])
        np.testing.assert_allclose(similarity, expected[0], atol=1e-6)


def test_nearest_of_a_memory_map(tmp_path):
    """As a run folder returns its arrays: read-only, which PyTorch would warn of."""
    np.save(tmp_path / "features.npy", data(30))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    np.testing.assert_array_equal(neighbours.nearest(mapped, 3)[1], peer(data(30), 3)[1])
    np.testing.assert_array_equal(neighbours.nearest(mapped, 3, mapped[:9])[1], peer(data(30), 3, data(30)[:9])[1])


def test_a_row_is_its_own_neighbour_only_in_a_bank():
    features = data(50)
    features[1] = features[0]  # duplicates find each other, not themselves
    similarity, index = neighbours.nearest(features, 49)
    assert all(i not in row for i, row in enumerate(index))
    assert (index[0, 0], index[1, 0]) == (1, 0) and similarity[0, 0] == pytest.approx(1)
    assert np.isfinite(similarity).all()
    assert (neighbours.nearest(features[2:], 1, features[2:])[1][:, 0] == np.arange(48)).all()


@pytest.mark.parametrize("bank, k, kept", [(None, 99, 9), (None, 9, 9), (4, 99, 4), (4, 4, 4), (4, 2, 2)])
def test_k_is_cut_to_what_exists(bank, k, kept):
    bank = None if bank is None else data(bank, seed=1)
    similarity, index = neighbours.nearest(data(10), k, bank)
    assert similarity.shape == index.shape == (10, kept)
    assert all(len(set(row)) == kept for row in index)
    assert (np.diff(similarity, axis=1) <= 0).all()


def slow_vote(similarity, labels, num_classes, temperature):
    result = []
    for sims, row in zip(similarity.tolist(), labels.tolist(), strict=True):
        votes = [0.0] * num_classes
        for s, label in zip(sims, row, strict=True):
            votes[label] += math.exp(s / temperature)
        result.append([v / sum(votes) for v in votes])
    return np.array(result)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("k, num_classes", [(1, 2), (5, 3), (20, 10)])
def test_vote_is_the_slow_loop(k, num_classes, temperature):
    draws = np.random.default_rng(k)
    similarity, labels = draws.uniform(-1, 1, (80, k)), draws.integers(0, num_classes, (80, k))
    votes = neighbours.vote(similarity, labels, num_classes, temperature)
    assert votes.dtype == np.float32
    np.testing.assert_allclose(votes, slow_vote(similarity, labels, num_classes, temperature), rtol=1e-5, atol=1e-7)


def test_vote_in_closed_form():
    """Equal neighbours count; one nearer by temperature x log 3 weighs three; far ones underflow to no zero sum."""
    votes = neighbours.vote(np.zeros((1, 4)), np.array([[0, 2, 2, 2]]), 4)
    np.testing.assert_allclose(votes, [[0.25, 0, 0.75, 0]])
    votes = neighbours.vote(np.array([[0.5 + 0.1 * math.log(3), 0.5]]), np.array([[1, 0]]), 2)
    np.testing.assert_allclose(votes, [[0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(neighbours.vote([[-1.0, -1.0]], np.array([[1, 0]]), 2, temperature=1e-4), [[0.5, 0.5]])


@pytest.mark.parametrize("seed", range(3))
def test_nearest_and_vote_predict_what_lightly_does(seed):
    from lightly.utils.benchmarking.knn import knn_predict

    features, bank = data(100, seed=seed), data(300, seed=seed + 10)
    labels = np.random.default_rng(seed).integers(0, 6, 300)
    similarity, index = neighbours.nearest(features, 20, bank)
    votes = neighbours.vote(similarity, labels[index], 6)
    unit = [torch.nn.functional.normalize(torch.as_tensor(x), dim=1) for x in (features, bank)]
    theirs = knn_predict(unit[0], unit[1].T, torch.as_tensor(labels), num_classes=6, knn_k=20, knn_t=0.1)
    np.testing.assert_array_equal(votes.argmax(1), theirs[:, 0].numpy())


@pytest.fixture(scope="module")
def umap():
    """The package, whose first import warns that TensorFlow is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import umap
    return umap


class Recorder:
    """In the place of UMAP: `options` are those of the last one made, `fitted` what it was given."""

    def __init__(self, **options):
        Recorder.options = options

    def fit_transform(self, x):
        Recorder.fitted = x
        return np.zeros((len(x), 2), np.float32)


@pytest.mark.parametrize(("n", "k"), [(40, 15), (25, 4), (17, 16)])
def test_the_plane_is_drawn_from_the_nearest_by_cosine(monkeypatch, umap, n, k):
    monkeypatch.setattr(umap, "UMAP", Recorder)
    features = data(n, 6)
    assert neighbours.embedding(features, 3, k).shape == (n, 2)
    index, distance = Recorder.options["precomputed_knn"][:2]
    assert Recorder.options["n_neighbors"] == k and Recorder.options["random_state"] == 3
    assert index.shape == distance.shape == (n, k) and distance.dtype == np.float32
    similarity, others = peer(features, k - 1)
    np.testing.assert_array_equal(index, np.c_[np.arange(n), others])
    np.testing.assert_array_equal(distance[:, 0], 0)
    np.testing.assert_allclose(distance[:, 1:], 1 - similarity, atol=1e-6)
    np.testing.assert_array_equal(Recorder.fitted, features)


def test_a_row_of_the_plane_comes_before_its_duplicates(monkeypatch, umap):
    """Rounding makes a few of the similarities of equal rows more than 1; no distance is below 0."""
    monkeypatch.setattr(umap, "UMAP", Recorder)
    features = np.repeat(data(30, 6), 2, axis=0)
    neighbours.embedding(features, 0, 4)
    index, distance = Recorder.options["precomputed_knn"][:2]
    assert neighbours.nearest(features, 1)[0].max() > 1
    np.testing.assert_array_equal(index[:, 0], np.arange(60))
    np.testing.assert_array_equal(index[:, 1], np.arange(60) ^ 1)
    assert distance.min() == 0 and distance[:, 1].max() < 1e-6


@pytest.mark.parametrize("n", [4, 8, 15])
def test_the_plane_of_few_rows_asks_for_fewer_neighbours_than_rows(monkeypatch, umap, n):
    """UMAP would warn, and take others than those it was given."""
    monkeypatch.setattr(umap, "UMAP", Recorder)
    neighbours.embedding(data(n, 6), 0)
    assert Recorder.options["n_neighbors"] == n - 1
    assert Recorder.options["precomputed_knn"][0].shape == (n, n - 1)


def test_the_plane_keeps_neighbourhoods(umap):
    """Digits of any length, so that the nearest by cosine are not the nearest by distance; read-only, as in a run."""
    draws = np.random.default_rng(0)
    features = (load_digits().data[:300] * 10 ** draws.uniform(-1, 1, (300, 1))).astype(np.float32)
    features.flags.writeable = False
    plane = neighbours.embedding(features, 0)
    assert plane.dtype == np.float32 and plane.shape == (300, 2) and np.isfinite(plane).all()
    np.testing.assert_array_equal(neighbours.embedding(features, 0), plane)
    assert not np.array_equal(neighbours.embedding(features, 1), plane)

    def kept(coordinates: np.ndarray) -> float:
        return trustworthiness(features, coordinates, n_neighbors=15, metric="cosine")

    assert kept(plane) > 0.95  # UMAP by cosine without our neighbours .97, by distance .80


def blobs(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    """Rows in clusters, as a network's features are."""
    draws = np.random.default_rng(seed)
    return (draws.normal(size=(20, d))[draws.integers(0, 20, n)] + draws.normal(0, 0.3, (n, d))).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 16, 50, 202])
@pytest.mark.parametrize("bank", [None, 150])
def test_a_bank_in_parts_finds_what_it_finds_whole(monkeypatch, tmp_path, rows, bank):
    """Mapped to a file, as what is larger than memory would be; parts of fewer rows than neighbours, too."""
    np.save(tmp_path / "features.npy", data(203))
    mapped, bank = np.load(tmp_path / "features.npy", mmap_mode="r"), None if bank is None else data(bank, seed=1)
    expected = neighbours.nearest(mapped, 5, bank)
    monkeypatch.setattr(neighbours, "BANK_ROWS", rows)
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 997)
    similarity, index = neighbours.nearest(mapped, 5, bank)
    np.testing.assert_array_equal(index, expected[1])
    np.testing.assert_allclose(similarity, expected[0], atol=1e-6)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("bank", [None, 3000])
def test_the_index_finds_most_of_the_neighbours(monkeypatch, capsys, bank, tensor):
    pytest.importorskip("faiss")
    features, bank = blobs(4000), None if bank is None else blobs(bank, seed=1)
    if tensor:
        features, bank = torch.from_numpy(features), None if bank is None else torch.from_numpy(bank)
    exact_similarity, exact = neighbours.nearest(features, 20, bank)
    monkeypatch.setattr(neighbours, "INDEX_FROM", 100)
    monkeypatch.setattr(neighbours, "BANK_ROWS", 777)
    monkeypatch.setattr(neighbours, "ROWS_A_LIST", 64)
    similarity, index = neighbours.nearest(features, 20, bank)
    assert similarity.dtype == np.float32 and index.dtype == np.int64 and index.shape == (4000, 20)
    assert neighbours.recall(index, exact) >= neighbours.RECALL - 0.03  # it was asked of a sample
    assert not (index == exact).all()  # it was not the exact search
    assert (np.diff(similarity, axis=1) <= 0).all() and (similarity <= exact_similarity + 1e-6).all()
    if bank is None:
        assert (index != np.arange(4000)[:, None]).all()
    assert "of the 20 nearest of 256 rows are found" in capsys.readouterr().err


def test_rows_that_the_index_finds_too_few_for_are_compared_with_all(monkeypatch, capsys):
    """Few lists of about 8 rows hold 20 neighbours and itself; the sample is content with any share of them."""
    pytest.importorskip("faiss")
    features = blobs(500)
    exact = neighbours.nearest(features, 20)[1]
    for name, value in {"INDEX_FROM": 10, "ROWS_A_LIST": 8, "TRAINED": 8, "RECALL": 0.0, "FEWEST": 1}.items():
        monkeypatch.setattr(neighbours, name, value)
    index = neighbours.nearest(features, 20)[1]
    assert (index >= 0).all() and (index == exact).all(1).mean() > 0.95


def test_without_faiss_all_pairs_are_compared_and_the_time_is_told(monkeypatch, capsys):
    features, exact = data(300), neighbours.nearest(data(300), 5)
    for name, value in {"INDEX_FROM": 10, "TOLD_FROM": -1, "BLOCK_ELEMENTS": 3000, "_faiss": lambda: None}.items():
        monkeypatch.setattr(neighbours, name, value)
    similarity, index = neighbours.nearest(features, 5)
    np.testing.assert_array_equal(index, exact[1])
    told = capsys.readouterr().err
    assert "comparing 300 x 300 rows takes about 0 minutes" in told and "pip install 'ptglab[faiss]'" in told


def test_recall_by_hand():
    assert neighbours.recall(np.array([[1, 2], [5, 4]]), np.array([[2, 3], [4, 5]])) == 0.75


def test_the_first_of_those_that_were_found_before():
    features = data(30)
    near = neighbours.nearest(features, 9)
    for k in (1, 9):
        for ours, theirs in zip(neighbours.first(near, None, k), neighbours.nearest(features, k), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert neighbours.first(neighbours.nearest(features[:5], 9), None, 9)[1].shape == (5, 4)
    with pytest.raises(InputError, match="10 are needed"):
        neighbours.first(near, None, 10)


@pytest.mark.parametrize("rows", [1, 7, 80])
def test_votes_are_counted_in_blocks(monkeypatch, rows):
    draws = np.random.default_rng(0)
    similarity, labels = draws.uniform(-1, 1, (80, 5)), draws.integers(0, 4, (80, 5))
    expected = neighbours.vote(similarity, labels, 4)
    monkeypatch.setattr(neighbours, "VOTERS", rows)
    np.testing.assert_array_equal(neighbours.vote(similarity, labels, 4), expected)
