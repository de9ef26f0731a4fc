"""Nearest neighbours by cosine similarity, in blocks: never an N x N matrix."""

import numpy as np
import torch

BLOCK_ELEMENTS = 1 << 25  # similarities held at a time: 128 MB of float32


def nearest(features, k: int, bank=None) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` most similar rows of `bank` for each row of `features`.

    features: [N, D]; bank: [M, D], or None to search among `features` with each row itself left out.
    Arrays or tensors; the search runs on the device the features lie on.
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


def _unit_rows(x) -> torch.Tensor:
    """Return [N, D] float32 with rows of length 1; an array may be read-only."""
    x = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x, np.float32))
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
