"""Nearest neighbours by cosine similarity, in blocks: never an N x N matrix; the plane UMAP draws from them."""

import sys
import time
import warnings

import numpy as np
import torch
from tqdm import tqdm

from ptglab.errors import InputError

Near = tuple[np.ndarray, np.ndarray]  # (similarity float32 [N, k], index int64 [N, k]), most similar first
BLOCK_ELEMENTS = 1 << 25  # similarities held at a time: 128 MB of float32
BANK_ROWS = 1 << 17  # rows that are searched at a time
INDEX_FROM = 50_000  # rows, squared, from which an index pays: all pairs take a quarter of a minute on two CPU cores
ROWS_A_LIST, TRAINED = 512, 64  # of the index: rows in each of its lists, and those that place its centre
RECALL, SAMPLE, FEWEST = 0.95, 256, 4  # of the neighbours that must be found; rows that are asked; lists at first
VOTERS = 1 << 16  # rows whose neighbours are counted at a time
TOLD_FROM = 60  # seconds of comparing all pairs that are announced


def nearest(features, k: int, bank=None) -> Near:
    """Return the `k` most similar rows of `bank` for each row of `features`.

    features: [N, D]; bank: [M, D], or None to search among `features` with each row itself left out. Arrays may be
    mapped to files: a block is in memory at a time, and the index, if there is one.
    Tensors are searched on the device they lie on, arrays on the GPU where there is one. On a CPU, where there are more
    than INDEX_FROM^2 pairs and faiss is installed, an index is asked instead, see `_indexed`; otherwise it is exact.
    Returns (similarity float32 [N, k] cosine, index int64 [N, k]), most similar first; k is cut to what exists.
    """
    itself, features = bank is None, _placed(features)
    bank = features if itself else _placed(bank)
    k = min(k, len(bank) - itself)
    if len(features) * len(bank) <= INDEX_FROM**2 or (isinstance(bank, torch.Tensor) and bank.is_cuda):
        return _exact(features, bank, k, np.arange(len(features)) if itself else None)
    if faiss := _faiss():
        return _indexed(faiss, features, bank, k, itself)
    hint = "; an index would be faster: pip install 'ptglab[faiss]'"
    return _exact(features, bank, k, np.arange(len(features)) if itself else None, hint)


def first(near: Near | None, features, k: int) -> Near:
    """Return the first `k` neighbours of `near`, what `nearest` found before; search `features` if that is None.

    Raises InputError if there are fewer of them.
    """
    if near is None:
        return nearest(features, k)
    similarity, index = (np.asarray(part) for part in near)
    k = min(k, len(index) - 1)
    if similarity.shape != index.shape or index.ndim != 2 or index.shape[1] < k:
        raise InputError(f"near holds {similarity.shape} similarities of {index.shape} neighbours; {k} are needed")
    return similarity[:, :k], index[:, :k]


def _exact(features, bank, k: int, own: np.ndarray | None, hint: str = "") -> Near:
    """Compare all pairs; own: int64 [N], the row of the bank that each of `features` is, and must not find, or None."""
    similarity, index = np.empty((len(features), k), np.float32), np.empty((len(features), k), np.int64)
    parts = [slice(start, start + BANK_ROWS) for start in range(0, len(bank), BANK_ROWS)]
    whole = _unit(bank) if len(parts) == 1 else None
    block = max(1, BLOCK_ELEMENTS // max(1, min(len(bank), BANK_ROWS)))
    began, told = time.perf_counter(), len(features) <= block
    for start in tqdm(range(0, len(features), block), "neighbours", delay=3, leave=False):
        rows = slice(start, start + block)
        queries, found = _unit(features[rows]), []
        for part in parts:
            sims = queries @ (_unit(bank[part]) if whole is None else whole).T
            if own is not None:
                there = torch.from_numpy(own[rows] - part.start).to(sims.device)
                inside = (there >= 0) & (there < sims.shape[1])
                sims[inside, there[inside]] = -torch.inf
            top = sims.topk(min(k, sims.shape[1]), dim=1)
            found.append((top.values, top.indices + part.start))
        values, indices = found[0]
        if len(found) > 1:
            values, indices = (torch.cat(column, 1) for column in zip(*found, strict=True))
            values, places = values.topk(k, dim=1)
            indices = indices.gather(1, places)
        similarity[rows], index[rows] = values.cpu().numpy(), indices.cpu().numpy()
        if not told:
            told, seconds = True, (time.perf_counter() - began) * len(features) / block
            if seconds > TOLD_FROM:
                pairs = f"{len(features):,} x {len(bank):,} rows"
                print(f"comparing {pairs} takes about {seconds / 60:,.0f} minutes{hint}", file=sys.stderr)
    return similarity, index


def _indexed(faiss, features, bank, k: int, itself: bool) -> Near:
    """Look in the lists of an inverted file that are nearest to each row: RECALL of the neighbours or more are found.

    Rows lie in lists of about ROWS_A_LIST, by the nearest of as many centres. How many lists are looked into is raised
    until it suffices for SAMPLE rows whose neighbours are known exactly. Rows that find fewer than k are compared with
    all. Jegou, Douze & Schmid 2011 (IEEE TPAMI 33), section 4; Douze et al. 2024 (arXiv 2401.08281).
    """
    began, n = time.perf_counter(), len(features)
    faiss.omp_set_num_threads(torch.get_num_threads())
    lists = max(1, len(bank) // ROWS_A_LIST)
    index = faiss.index_factory(bank.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = TRAINED, 1
    index.train(_unit(bank[:: max(1, ROWS_A_LIST // TRAINED)]).numpy())
    for start in range(0, len(bank), BANK_ROWS):
        index.add(_unit(bank[start : start + BANK_ROWS]).numpy())
    home = np.empty(n, np.int64)  # the list of each row: rows of one are asked together, for theirs are then at hand
    for start in range(0, n, BANK_ROWS):
        rows = slice(start, start + BANK_ROWS)
        home[rows] = index.quantizer.search(_unit(features[rows]).numpy(), 1)[1][:, 0]
    order = np.argsort(home, kind="stable")

    def look(rows: np.ndarray) -> Near:
        similarity, found = index.search(_unit(features[rows]).numpy(), min(k + itself, len(bank)))
        if itself:
            similarity[found == rows[:, None]] = -np.inf
            last = np.argsort(similarity == -np.inf, axis=1, kind="stable")[:, :k]
            similarity, found = np.take_along_axis(similarity, last, 1), np.take_along_axis(found, last, 1)
        return similarity, found

    sample = np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)
    exact, index.nprobe = _exact(features[sample], bank, k, sample if itself else None)[1], min(FEWEST, lists)
    while (share := recall(look(sample)[1], exact)) < RECALL and index.nprobe < lists:
        index.nprobe = min(lists, index.nprobe + max(1, index.nprobe // 2))
    similarity, found = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    block = max(1, BLOCK_ELEMENTS // 256)
    for start in tqdm(range(0, n, block), "neighbours", delay=3, leave=False):
        rows = order[start : start + block]
        similarity[rows], found[rows] = look(rows)
    short = np.flatnonzero((found < 0).any(1) | ~np.isfinite(similarity).all(1))
    if len(short):
        similarity[short], found[short] = _exact(features[short], bank, k, short if itself else None)
    seconds = time.perf_counter() - began
    print(f"neighbours by faiss: {share:.1%} of the {k} nearest of {len(sample)} rows are found, "
          f"{index.nprobe} of {lists:,} lists, {seconds:,.0f} s", file=sys.stderr)  # fmt: skip
    return similarity, found


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the neighbours `exact`, int64 [N, k], that are among those `found`, int64 [N, k]."""
    same = sum(len(np.intersect1d(ours, theirs)) for ours, theirs in zip(found, exact, strict=True))
    return same / max(1, exact.size)


def _faiss():
    """Return the package, or None if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its bindings
        try:
            import faiss
        except ImportError:
            return None
    return faiss


def embedding(features, seed: int, k: int = 15, near: Near | None = None) -> np.ndarray:
    """Return UMAP coordinates float32 [N, 2] of `features` [N, D], from their `k` nearest by cosine similarity.

    The neighbours are those of `nearest`, or `near`, each row its own first. McInnes et al. 2018 (arXiv 1802.03426).
    """
    k = min(k, len(features) - 1)
    similarity, index = first(near, features, k - 1)
    itself = np.arange(len(index))[:, None]
    distance = np.hstack([np.zeros(itself.shape, np.float32), np.clip(1 - similarity, 0, None)])
    graph = np.hstack([itself, index]), distance, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of parts of UMAP that need TensorFlow
        warnings.filterwarnings("ignore", "precomputed_knn.2.")  # it has no tree to place new rows with
        from umap import UMAP

        return UMAP(n_neighbors=k, precomputed_knn=graph, random_state=seed, n_jobs=1).fit_transform(np.array(features))


def _placed(x):
    """Return `x`; an array goes to the GPU, where there is one, and otherwise stays where it is mapped."""
    if isinstance(x, torch.Tensor) or not torch.cuda.is_available():
        return x
    return torch.from_numpy(np.array(x, np.float32)).to("cuda")


def _unit(x) -> torch.Tensor:
    """Return [N, D] float32 with rows of length 1; an array may be read-only, and is copied."""
    if isinstance(x, torch.Tensor):
        return torch.nn.functional.normalize(x.float(), dim=1)
    x = torch.from_numpy(np.array(x, np.float32))
    return x.div_(x.norm(dim=1, keepdim=True).clamp_(min=1e-12))


def vote(similarity, neighbour_labels, num_classes: int, temperature: float = 0.1) -> np.ndarray:
    """Return class probabilities float32 [N, K]: neighbours vote with weight exp(similarity / temperature).

    similarity, neighbour_labels: [N, k]. Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    n, similarity, votes = len(similarity), np.asarray(similarity), []
    for start in range(0, max(n, 1), VOTERS):
        near, labels = similarity[start : start + VOTERS], neighbour_labels[start : start + VOTERS]
        weights = np.exp((near - near.max(1, keepdims=True)) / temperature)
        sums = np.zeros((len(weights), num_classes), np.float64)
        np.add.at(sums, (np.arange(len(weights))[:, None], labels), weights)
        votes.append((sums / sums.sum(1, keepdims=True)).astype(np.float32))
    return np.concatenate(votes)
