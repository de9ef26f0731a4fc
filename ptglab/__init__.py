"""ptglab: learn from wrongly labelled images without any clean subset, and find the wrong labels.

Every module is imported by its name alone, when it is first used: `from ptglab import data, noise, pretrain`.
"""

import os

# OpenMP reads this when torch is first imported. Threads that wait soon sleep instead of spinning for milliseconds;
# otherwise two processes on the same cores slow each other many times over.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Python reads this when a process is started, as those that decode images are: they import nothing from the working
# folder, in which images may lie beside modules that are not ours to run. `PYTHONSAFEPATH=` leaves it as it was.
os.environ.setdefault("PYTHONSAFEPATH", "1")

__version__ = "0.1.0"


def __getattr__(name: str):
    """Return the module `name` of one of the folders."""
    import importlib
    from pathlib import Path

    for path in Path(__file__).parent.glob(f"*/{name}.py"):
        return importlib.import_module(f"ptglab.{path.parent.name}.{name}")
    raise AttributeError(f"ptglab has no module '{name}'")


def __dir__() -> list[str]:
    from pathlib import Path

    return sorted(path.stem for path in Path(__file__).parent.glob("**/[a-z]*.py"))
