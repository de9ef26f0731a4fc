"""Images and their given labels, from anywhere: names, folders, tables, parquet files, published sets."""

from ptglab.data.images import (
    CIFAR_N,
    NAMES,
    ImageSet,
    check_labels,
    load,
    located,
    read_cifar_n,
    root,
    splits,
)

__all__ = ["CIFAR_N", "NAMES", "ImageSet", "check_labels", "load", "located", "read_cifar_n", "root", "splits"]
