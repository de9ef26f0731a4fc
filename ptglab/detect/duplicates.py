"""Images that are odd whatever their label: near-duplicates, which should share a label, and outliers."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

SIDE = 16  # pixels a side at which near-duplicates are compared
COARSE_SIDE = 4  # pixels a side at which they are looked for: the difference there is never larger than at SIDE
ALIKE = 0.15  # largest difference of near-duplicates, as a share of their contrast: a correlation of .989
BLOCK_ROWS = 4096  # images or pairs that are compared at a time
FAR = 3.5  # robust deviations above the median that make an outlier; Iglewicz & Hoaglin 1993, section 3


def duplicates(images: Tensor, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (pairs int64 [P, 2], first row below the second; difference float32 [P]) of near-duplicates, least first.

    images: uint8 [N, C, H, W]; index: int64 [N, k], the rows nearest to each by their features: only these are
    compared. The difference is the root mean square difference of the pixels, at SIDE x SIDE, divided by the root of
    the two images' mean variance.
    """
    n = len(images)
    coarse, variance = np.empty((n, images.shape[1] * COARSE_SIDE**2), np.float32), np.empty(n, np.float32)
    for start in range(0, n, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        x = F.adaptive_avg_pool2d(images[rows].float(), SIDE)
        coarse[rows] = F.avg_pool2d(x, SIDE // COARSE_SIDE).flatten(1).numpy()
        variance[rows] = x.flatten(1).var(1).numpy()

    def relative(first: np.ndarray, second: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        contrast = np.maximum((variance[first] + variance[second]) / 2, 1)  # less than a grey level is no contrast
        return np.sqrt(np.square(x - y).mean(1) / contrast)

    pairs = []
    for start in range(0, n, BLOCK_ROWS):
        others = index[start : start + BLOCK_ROWS]
        first, second = np.repeat(np.arange(start, start + len(others)), index.shape[1]), others.ravel()
        close = relative(first, second, coarse[first], coarse[second]) <= 1.001 * ALIKE  # but for rounding
        pairs.append(np.column_stack([first, second])[close])
    pairs = np.unique(np.sort(np.concatenate(pairs), 1), axis=0)
    difference = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        both = [F.adaptive_avg_pool2d(images[side].float(), SIDE).flatten(1).numpy() for side in pairs[rows].T]
        difference[rows] = relative(*pairs[rows].T, *both)
    order = np.argsort(difference, kind="stable")[: (difference <= ALIKE).sum()]
    return pairs[order], difference[order]


def outliers(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (score float32 [N], low = odd; flagged bool [N]) from the similarity [N, k] to the nearest rows.

    The score is the mean similarity. Flagged: the logarithm of the mean distance lies more than FAR robust deviations
    above the median (the modified z-score of Iglewicz & Hoaglin 1993, "How to Detect and Handle Outliers").
    """
    score = similarity.mean(1)
    distance = np.log(np.clip(1 - score, 1e-6, None))
    above = distance - np.median(distance)
    return score.astype(np.float32), 0.6745 * above > FAR * max(np.median(np.abs(above)), 1e-6)
