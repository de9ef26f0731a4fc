"""ptglab: learn from wrongly labelled images without any clean subset, and find the wrong labels.

The rooms are modules; import the one you need: `from ptglab import data, noise, pretrain`.
"""

import os

# Before torch is first imported: its threads soon sleep while they wait, instead of spinning for milliseconds, by which
# two processes on the same cores would slow each other many times over.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
