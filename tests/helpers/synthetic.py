"""Made-up problems whose wrong labels are known."""

import numpy as np


def planted(n: int = 1000, k: int = 5, rate: float = 0.2, seed: int = 0):
    """Return (labels_given, labels_true, probs, features) of a made-up problem whose wrong labels are known.

    Classes are Gaussian blobs in 16 dimensions; `probs` is the posterior under the true blobs, so that no row was
    predicted from its label.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(k, 16))
    true = rng.integers(0, k, n)
    features = (centres[true] + rng.normal(scale=0.5, size=(n, 16))).astype(np.float32)
    distance = ((features[:, None] - centres) ** 2).sum(2)
    logits = -distance / (2 * 0.5**2) / 4  # a quarter: a head is never as sure as the truth
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    given = np.where(rng.random(n) < rate, (true + rng.integers(1, k, n)) % k, true)
    return given, true, probs, features
