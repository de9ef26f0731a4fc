"""Nearest neighbours by cosine similarity, in blocks: never an N x N matrix; the plane UMAP draws from them."""

import warnings

import numpy as np
import torch

BLOCK_ELEMENTS = 1 << 25  # similarities held at a time: 128 MB of float32


def nearest(features, k: int, bank=None) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` most similar rows of `bank` for each row of `features`.

    features: [N, D]; bank: [M, D], or None to search among `features` with each row itself left out.
    Tensors are searched on the device they lie on, arrays on the GPU where there is one.
    Returns (similarity float32 [N, k] cosine, index int64 [N, k]), most similar first; k is cut to what exists.
    """
    queries, itself = _unit_rows(features), bank is None
    bank = queries if itself else _unit_rows(bank)
    k = min(k, len(bank) - itself)
    similarity = np.empty((len(queries), k), np.float32)
    index = np.empty((len(queries), k), np.int64)
    block = max(1, BLOCK_ELEMENTS // max(1, len(bank)))
    for start in range(0, len(queries), block):
        sims = queries[start : start + block] @ bank.T
        if itself:
            rows = torch.arange(len(sims), device=sims.device)
            sims[rows, start + rows] = -torch.inf
        top = sims.topk(k, dim=1)
        similarity[start : start + block] = top.values.cpu().numpy()
        index[start : start + block] = top.indices.cpu().numpy()
    return similarity, index


def plane(features, seed: int, k: int = 15) -> np.ndarray:
    """Return UMAP coordinates float32 [N, 2] of `features` [N, D], from their `k` nearest by cosine similarity.

    The neighbours are those of `nearest`, each row its own first. McInnes et al. 2018 (arXiv 1802.03426).
    """
    k = min(k, len(features) - 1)
    similarity, index = nearest(features, k - 1)
    itself = np.arange(len(index))[:, None]
    distance = np.hstack([np.zeros(itself.shape, np.float32), np.clip(1 - similarity, 0, None)])
    graph = np.hstack([itself, index]), distance, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of parts of UMAP that need TensorFlow
        warnings.filterwarnings("ignore", "precomputed_knn.2.")  # it has no tree to place new rows with
        from umap import UMAP

        return UMAP(n_neighbors=k, precomputed_knn=graph, random_state=seed, n_jobs=1).fit_transform(np.array(features))


def _unit_rows(x) -> torch.Tensor:
    """Return [N, D] float32 with rows of length 1; an array may be read-only, and is copied once."""
    if not isinstance(x, torch.Tensor):
        x = torch.from_numpy(np.array(x, np.float32)).to("cuda" if torch.cuda.is_available() else "cpu")
        return x.div_(x.norm(dim=1, keepdim=True).clamp_(min=1e-12))
    return torch.nn.functional.normalize(x.float(), dim=1)


def vote(similarity, neighbour_labels, num_classes: int, temperature: float = 0.1) -> np.ndarray:
    """Return class probabilities float32 [N, K]: neighbours vote with weight exp(similarity / temperature).

    similarity, neighbour_labels: [N, k]. Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    similarity = np.asarray(similarity)
    weights = np.exp((similarity - similarity.max(1, keepdims=True)) / temperature)
    votes = np.zeros((len(weights), num_classes), np.float64)
    np.add.at(votes, (np.arange(len(weights))[:, None], neighbour_labels), weights)
    return (votes / votes.sum(1, keepdims=True)).astype(np.float32)
