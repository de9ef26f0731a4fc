"""Problems with wrong labels that the tests of the detectors share."""

import functools

import numpy as np
import pytest
from synthetic import planted

from ptglab.train import predict

both_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def random_problem(seed: int, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Return (labels, probs) of random N, K, noise and sharpness; every third has ties, every fourth an empty class."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(50, 1500)), (2, 20)[seed] if seed < 2 else int(rng.integers(2, 21))
    true = rng.integers(0, k, n)
    logits = 10 ** rng.uniform(-0.5, 1) * (rng.normal(size=(n, k)) + 1.5 * np.eye(k)[true])
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    if seed % 3 == 0:
        probs = rng.multinomial(8, probs) / 8
    labels = np.where(rng.random(n) < rng.uniform(0.05, 0.6), rng.integers(0, k, n), true)
    if seed % 4 == 0 and k > 2:
        labels[labels == k // 2] = 0
    return labels, probs.astype(dtype)


@functools.cache
def blobs(rate: float, seed: int, dimensions: int = 16, asymmetric: bool = False, n: int = 1000):
    """Return (labels, probs, features, history, true labels), read only: blobs far apart, overlapping in 4 dimensions.

    The probabilities are out of fold, from a head fitted on the noisy labels. Asymmetric: a wrong label is the next
    class. The history has 12 epochs: right labels are learned at once, wrong ones by the end.
    """
    given, true, _, features = planted(n=n, rate=rate, seed=seed)
    rng = np.random.default_rng([seed, 1])
    if asymmetric:
        given = np.where(rng.random(n) < rate, (true + 1) % 5, true)
    features = features[:, :dimensions]
    probs = predict.out_of_fold(features, given, 5, seed=seed)
    learned = np.where(given == true, 0.5, 10) + rng.exponential(0.7, n)  # the epoch
    margins = (np.arange(12)[:, None] - learned) / 4 + rng.normal(scale=0.3, size=(12, n))
    arrays = given, probs, features, margins.astype(np.float32), true
    for array in arrays:
        array.flags.writeable = False
    return arrays


overlapping = functools.partial(blobs, dimensions=4)
