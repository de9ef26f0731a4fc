"""Images that are odd whatever they are called: near-duplicates, which should share a label, and outliers."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

SIDE = 16  # pixels a side that near-duplicates are compared at
ALIKE = 0.15  # largest difference of near-duplicates, as a share of their contrast: a correlation of .989
BLOCK_ROWS = 4096  # images that are compared at a time
FAR = 3.5  # robust deviations above the median that make an outlier; Iglewicz & Hoaglin 1993, section 3


def duplicates(images: Tensor, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (pairs int64 [P, 2], first row below the second; difference float32 [P]) of near-duplicates, least first.

    images: uint8 [N, C, H, W]; index: int64 [N, k], the rows nearest to each by their features, which alone are
    compared. The difference is the root mean square one of all pixels, at SIDE x SIDE, over the root of the two
    images' mean variance; of two blank images it is 0.
    """
    n, size = len(images), images.shape[1] * SIDE**2
    small = np.empty((n, size), np.float32)
    variance = np.empty(n, np.float32)
    for start in range(0, n, BLOCK_ROWS):
        x = F.adaptive_avg_pool2d(images[start : start + BLOCK_ROWS].float(), SIDE).flatten(1)
        small[start : start + BLOCK_ROWS], variance[start : start + BLOCK_ROWS] = x.numpy(), x.var(1).numpy()
    found = []
    for column in index.T:
        for start in range(0, n, BLOCK_ROWS):
            others = column[start : start + BLOCK_ROWS]
            first = np.arange(start, start + len(others))
            apart = np.square(small[first] - small[others]).mean(1)
            contrast = (variance[first] + variance[others]) / 2
            near = apart <= ALIKE**2 * np.maximum(contrast, 1)  # less than a grey level is no contrast
            difference = np.sqrt(apart[near] / np.maximum(contrast[near], 1))
            rows = np.sort(np.column_stack([first, others])[near], 1)
            found.append(np.column_stack([rows, difference]))
    pairs, at = np.unique(np.concatenate(found)[:, :2], axis=0, return_index=True)
    difference = np.concatenate(found)[at, 2]
    order = np.argsort(difference, kind="stable")
    return pairs[order].astype(np.int64), difference[order].astype(np.float32)


def outliers(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (score float32 [N], low = odd; flagged bool [N]) by the mean similarity [N, k] to the nearest rows.

    Flagged: the logarithm of the mean distance lies more than FAR robust deviations above the median (the modified
    z-score of Iglewicz & Hoaglin 1993, "How to Detect and Handle Outliers").
    """
    score = similarity.mean(1)
    far = np.log(np.clip(1 - score, 1e-6, None))
    apart = far - np.median(far)
    deviation = np.median(np.abs(apart))
    return score.astype(np.float32), 0.6745 * apart > FAR * max(deviation, 1e-6)
