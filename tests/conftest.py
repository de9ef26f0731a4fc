"""Small inputs the tests share."""

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # faster for networks this small, and several times so on a busy machine

import ptglab  # noqa: F401, I001 - before torch: it says how threads wait
import numpy as np
import pytest

from ptglab import data, engine
from ptglab.errors import InputError

with contextlib.suppress(ModuleNotFoundError):  # tests of CUDA also run where the lab's packages are not
    from explored import images, opened, swept  # noqa: F401 - fixtures
    from reviewed import found  # noqa: F401 - a fixture


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory) -> None:
    """What tests cache is left in no home, also by the processes they start."""
    os.environ["PTGLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def digits() -> data.ImageSet:
    """The embedded digits, 1,437 training images."""
    return data.load("digits")


@pytest.fixture(scope="session")
def few(digits) -> data.ImageSet:
    """256 digits, for what only has to run."""
    return digits.subset(256, seed=0)


@pytest.fixture
def cpu() -> engine.Place:
    return engine.place("cpu")


def planted(n: int = 1000, k: int = 5, rate: float = 0.2, seed: int = 0):
    """Return (labels_given, labels_true, probs, features) of a made-up problem whose wrong labels are known.

    Classes are Gaussian blobs in 16 dimensions; `probs` is the posterior under the true blobs, so that no row was
    predicted from its label.
    """
    draws = np.random.default_rng(seed)
    centres = draws.normal(size=(k, 16))
    true = draws.integers(0, k, n)
    features = (centres[true] + draws.normal(scale=0.5, size=(n, 16))).astype(np.float32)
    distance = ((features[:, None] - centres) ** 2).sum(2)
    logits = -distance / (2 * 0.5**2) / 4  # a quarter: a head is never as sure as the truth
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    given = np.where(draws.random(n) < rate, (true + draws.integers(1, k, n)) % k, true)
    return given, true, probs, features


def refused(*words, call=data.load):
    """Return a function that calls `call` and asserts that it is refused in one line with all of `words`."""

    def check(*args, **kwargs):
        with pytest.raises(InputError) as caught:
            call(*args, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        assert [word for word in words if word not in message] == [], message

    return check
