"""Fixtures that every folder of tests shares: small image sets, a place to compute, a cache of its own."""

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # faster for networks this small, and several times so on a busy machine

import ptglab  # noqa: F401, I001 - before torch: it says how threads wait
import pytest

from ptglab import data
from ptglab.train import engine

with contextlib.suppress(ModuleNotFoundError):  # tests of CUDA also run where the lab's packages are not
    from explored import images, opened, swept  # noqa: F401 - fixtures
    from reviewed import found  # noqa: F401 - a fixture


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory) -> None:
    """Keep the caches of tests, and of the processes they start, out of the home folder."""
    os.environ["PTGLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def digits() -> data.ImageSet:
    """Return the embedded digits, 1,437 training images."""
    return data.load("digits")


@pytest.fixture(scope="session")
def few(digits) -> data.ImageSet:
    """Return 256 of the digits, for tests of what only has to run."""
    return digits.subset(256, seed=0)


@pytest.fixture
def cpu() -> engine.Place:
    """Return the CPU as the place to compute."""
    return engine.place("cpu")
