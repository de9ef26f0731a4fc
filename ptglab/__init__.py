"""ptglab: learn from wrongly labelled images without any clean subset, and find the wrong labels.

The rooms are modules; import the one you need: `from ptglab import data, noise, pretrain`.
"""

__version__ = "0.1.0"
