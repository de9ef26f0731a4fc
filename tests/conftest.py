"""Small inputs the tests share."""

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
