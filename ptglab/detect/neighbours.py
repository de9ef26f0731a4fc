"""Nearest neighbours by cosine similarity, in blocks: never an N x N matrix; their vote; the UMAP embedding of them."""

import sys
import warnings

import numpy as np
import torch
from tqdm import tqdm

from ptglab.errors import InputError

Neighbours = tuple[np.ndarray, np.ndarray]  # (similarity float32 [N, k], index int64 [N, k]), most similar first
BLOCK_ELEMENTS, BLOCK_ROWS = 1 << 25, 1 << 16  # similarities held, and rows indexed or voted on, at a time
INDEX_FROM = 50_000  # rows, squared, from which an index pays: all pairs take a quarter of a minute on two CPU cores
LIST_ROWS, TRAIN_ROWS = 512, 64  # rows in each list of the index, and rows that place its centre
RECALL, SAMPLE = 0.95, 256  # share of the neighbours that must be found, as measured on this many rows
FIRST_LISTS = 4  # lists searched at first


def nearest(features, k: int, bank=None) -> Neighbours:
    """Return the `k` rows of `bank` [M, D], or as many as there are, most similar to each row of `features` [N, D].

    Without a bank, they are the other rows of `features`. Arrays may be mapped from files; the bank is held in memory.
    Tensors are searched on the device where they are, arrays on the GPU if there is one. The search is exact, except on
    a CPU with more than INDEX_FROM^2 pairs and faiss installed: see `_indexed`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = features.device if isinstance(features, torch.Tensor) else device
    own, bank = bank is None, features if bank is None else bank
    k = min(k, len(bank) - own)
    if device.type == "cpu" and len(features) * len(bank) > INDEX_FROM**2:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of its bindings
                import faiss
        except ImportError:
            pairs = f"{len(features):,} x {len(bank):,} rows"
            print(f"comparing {pairs}; an index would be faster: pip install 'ptglab[faiss]'", file=sys.stderr)
        else:
            return _indexed(faiss, features, bank, k, own)
    return _exact(features, np.arange(len(features)), bank, k, own, device)


def first_k(neighbours: Neighbours | None, features, k: int) -> Neighbours:
    """Return the first `k` of `neighbours`, which `nearest` found before, or search `features` if that is None.

    Raises InputError if there are fewer than `k` of them.
    """
    if neighbours is None:
        return nearest(features, k)
    similarity, index = (np.asarray(part) for part in neighbours)
    k = min(k, len(index) - 1)
    if similarity.shape != index.shape or index.ndim != 2 or index.shape[1] < k:
        raise InputError(f"neighbours are {similarity.shape} similarities and {index.shape} rows; {k} are needed each")
    return similarity[:, :k], index[:, :k]


def _exact(features, rows: np.ndarray, bank, k: int, own: bool, device="cpu") -> Neighbours:
    """Compare the `rows` of `features` with the whole bank; if that is their `own`, they do not find themselves."""
    similarity, index = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    bank, block = _normalize(bank, device), max(1, BLOCK_ELEMENTS // max(1, len(bank)))
    for start in tqdm(range(0, len(rows), block), "neighbours", delay=3, leave=False):
        part = slice(start, start + block)
        sims = _normalize(features[rows[part]], device) @ bank.T
        if own:
            sims[np.arange(len(sims)), rows[part]] = -torch.inf
        top = sims.topk(k, dim=1)
        similarity[part], index[part] = top.values.cpu().numpy(), top.indices.cpu().numpy()
    return similarity, index


def _indexed(faiss, features, bank, k: int, own: bool) -> Neighbours:
    """Search the lists of an inverted file that are nearest to each row, which finds about RECALL of the neighbours.

    More lists are searched until they suffice for SAMPLE rows whose neighbours are known exactly. Rows that find fewer
    than k are compared with all. Jegou, Douze & Schmid 2011 (IEEE TPAMI 33), section 4.
    """
    n, lists = len(features), max(1, len(bank) // LIST_ROWS)
    faiss.omp_set_num_threads(torch.get_num_threads())
    file = faiss.index_factory(bank.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    file.cp.max_points_per_centroid, file.cp.min_points_per_centroid = TRAIN_ROWS, 1
    file.train(_normalize(bank[:: max(1, LIST_ROWS // TRAIN_ROWS)]).numpy())
    for start in range(0, len(bank), BLOCK_ROWS):
        file.add(_normalize(bank[start : start + BLOCK_ROWS]).numpy())

    def search(rows: np.ndarray) -> Neighbours:
        found = file.search(_normalize(features[rows]).numpy(), min(k + own, len(bank)))
        order = np.argsort(own & (found[1] == rows[:, None]), axis=1, kind="stable")[:, :k]  # the row itself comes last
        return np.take_along_axis(found[0], order, 1), np.take_along_axis(found[1], order, 1)

    sample = np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)
    exact, file.nprobe = _exact(features, sample, bank, k, own)[1], min(FIRST_LISTS, lists)
    while (found := recall(search(sample)[1], exact)) < RECALL and file.nprobe < lists:
        file.nprobe = min(lists, file.nprobe + max(1, file.nprobe // 2))
    parts = np.array_split(np.arange(n), -(-n // BLOCK_ROWS))
    found_parts = [search(rows) for rows in tqdm(parts, "neighbours", delay=3, leave=False)]
    similarity, index = (np.concatenate(part) for part in zip(*found_parts, strict=True))
    if len(short := np.flatnonzero((index < 0).any(1))):
        similarity[short], index[short] = _exact(features, short, bank, k, own)
    print(f"neighbours by faiss: {found:.1%} of the {k} nearest of {len(sample)} rows are found in "
          f"{file.nprobe} of {lists:,} lists", file=sys.stderr)  # fmt: skip
    return similarity, index


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the neighbours `exact`, int64 [N, k], that are among those `found`, int64 [N, k]."""
    return float(np.mean([np.isin(theirs, ours) for ours, theirs in zip(found, exact, strict=True)]))


def embedding(features, seed: int, k: int = 15, neighbours: Neighbours | None = None) -> np.ndarray:
    """Return UMAP coordinates float32 [N, 2] of `features` [N, D], from each row and its `k` - 1 nearest by cosine.

    `neighbours`: what `nearest` found before. McInnes et al. 2018 (arXiv 1802.03426).
    """
    k = min(k, len(features) - 1)
    similarity, index = first_k(neighbours, features, k - 1)
    distance = np.pad(np.clip(1 - similarity, 0, None), ((0, 0), (1, 0)))  # of each row itself: 0
    graph = np.column_stack([np.arange(len(index)), index]), distance, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of parts of UMAP that need TensorFlow
        warnings.filterwarnings("ignore", "precomputed_knn.2.")  # without the search tree no new rows can be placed
        from umap import UMAP

        return UMAP(n_neighbors=k, precomputed_knn=graph, random_state=seed, n_jobs=1).fit_transform(np.array(features))


def _normalize(x, device="cpu") -> torch.Tensor:
    """Return a copy of `x`, a tensor or an array that may be read-only, as float32 [N, D] with rows of length 1."""
    tensor = isinstance(x, torch.Tensor)
    x = x.to(device, torch.float32, copy=True) if tensor else torch.from_numpy(np.array(x, np.float32)).to(device)
    return x.div_(x.norm(dim=1, keepdim=True).clamp_(min=1e-12))


def vote(similarity, neighbour_labels, num_classes: int, temperature: float = 0.1) -> np.ndarray:
    """Return class probabilities float32 [N, K]: neighbours vote with weight exp(similarity / temperature).

    similarity, neighbour_labels: [N, k]. Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    similarity, votes = np.asarray(similarity), np.empty((len(similarity), num_classes), np.float32)
    for start in range(0, len(votes), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        weights = np.exp((similarity[rows] - similarity[rows].max(1, keepdims=True)) / temperature)
        sums = np.zeros((len(weights), num_classes))
        np.add.at(sums, (np.arange(len(weights))[:, None], neighbour_labels[rows]), weights)
        votes[rows] = sums / sums.sum(1, keepdims=True)
    return votes
