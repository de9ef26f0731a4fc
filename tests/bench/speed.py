"""How fast: ours beside the peers on the same work, cost against size, and the share of the machine's arithmetic."""

import importlib.metadata
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import peers
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptglab.data import noise
from ptglab.detect import label_errors, neighbours
from ptglab.train import augment, backbones, engine, predict, pretrain


@dataclass(frozen=True)
class Comparison:
    """The same `work` done by us and by a peer; `difference` compares what the two return, `allowed` bounds it."""

    work: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    difference: Callable[[object, object], float] = lambda ours, peer: 0.0
    allowed: float = 0.0


def measure(comparison: Comparison, rounds: int) -> dict[str, float]:
    """Run ours and the peer in turn, `rounds` times each after one round unmeasured; see `summary`."""
    results = comparison.ours(), comparison.peer()
    seconds = [(timed(comparison.ours), timed(comparison.peer)) for _ in range(rounds)]
    return summary(*zip(*seconds, strict=True)) | {"difference": comparison.difference(*results)}


def summary(ours: Iterable[float], peer: Iterable[float]) -> dict[str, float]:
    """Return the medians `ours` and `peer` of seconds [R] measured in turn, their `ratio` and its range over rounds."""
    ours, peer = np.array(ours), np.array(peer)
    ratios = peer / ours
    medians = {"ours": np.median(ours), "peer": np.median(peer), "ratio": np.median(peer) / np.median(ours)}
    return medians | {"lowest_ratio": ratios.min(), "highest_ratio": ratios.max()}


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of one call, the GPU's work included."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def augmentation(peer: str, n: int, size: int = 32, batch_size: int = 512) -> Comparison:
    """Two views of `n` images: ours a batch at a time; torchvision's in a loader, or kornia's batches."""
    images = peers.random_images(n, size)
    draws = engine.generator("cpu", 0, "speed")

    def ours() -> None:
        for batch in images.split(batch_size):
            augment.two_views(batch, "simclr", draws)

    if peer == "torchvision":
        batches = peers.loader(
            peers.TwoViews(images, peers.torchvision_views(size)), min(batch_size, n // engine.threads())
        )
        return Comparison(f"two views of {n:,} images of {size} pixels", ours, lambda: [None for _ in batches])
    change = peers.kornia_views(size)

    def theirs() -> None:
        for batch in images.split(batch_size):
            change(batch.float() / 255), change(batch.float() / 255)

    return Comparison(f"two views of {n:,} images of {size} pixels", ours, theirs)


def ssl_epoch(
    peer: str,
    n: int,
    size: int = 32,
    width: int = 16,
    batch_size: int = 256,
    place: engine.Place | None = None,
    method: str = "simclr",
) -> Comparison:
    """One epoch of `method` by `pretrain.train`, and the same network in the peer's loop, fed by a loader.

    lightly: SimCLR only, its transform and its loss, a forward a view, the default memory format, in a process of its
    own, as it is without ptglab. torchvision: transforms v2, and the rest as ours, so that only the feeding differs.
    """
    place, images = place or engine.place(), peers.random_images(n, size)
    batch_size = min(batch_size, n // engine.threads())
    backbone = backbones.build("resnet18", width, images, 0)
    ours = pretrain.train(backbone, images, method, epochs=peers.EPOCHS, batch_size=batch_size, place=place)
    options = (peer, n, size, width, batch_size, place, method)
    alone = ProcessPoolExecutor(1, get_context("spawn"))
    there = {"torchvision": lambda: peers.run_epoch(*options),
             "lightly": lambda: alone.submit(peers.run_epoch, *options).result()}  # fmt: skip
    return Comparison(f"{method} epoch, {n:,} images of {size} pixels, width {width}", lambda: next(ours), there[peer])


def confident_learning(n: int, k: int) -> Comparison:
    """The detector against cleanlab's `find_label_issues`; the difference is the number of flags that differ."""
    from cleanlab.filter import find_label_issues

    labels, probs = random_probs(n, k)
    return Comparison(
        f"confident learning, {n:,} x {k}",
        lambda: label_errors.detect("confident_learning", labels, probs).flagged,
        lambda: find_label_issues(labels, probs, filter_by="confident_learning"),
        lambda ours, peer: float((ours != peer).sum()),
    )


def random_probs(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (labels int64 [n], probs float32 [n, k]): 30 % of the labels drawn anew, most rows fairly sure."""
    draws = np.random.default_rng(seed)
    true = draws.integers(0, k, n)
    probs = draws.random((n, k), np.float32) ** 8
    probs[np.arange(n), true] += 3 * draws.random(n, np.float32)
    probs /= probs.sum(1, keepdims=True)
    return np.where(draws.random(n) < 0.3, draws.integers(0, k, n), true), probs


def linear_heads(n: int, d: int = 128, k: int = 10, folds: int = 5) -> Comparison:
    """Out-of-fold heads for three noise rates and two seeds against scikit-learn, one by one.

    The difference is the largest one in accuracy, over the versions of the labels, on the true classes.
    """
    from sklearn.linear_model import LogisticRegression

    draws = np.random.default_rng(0)
    true = draws.integers(0, k, n)
    x = draws.normal(size=(k, d))[true] * 0.35 + draws.normal(size=(n, d))
    x = np.maximum(x @ (np.eye(d) + 0.3 * draws.normal(size=(d, d)) / np.sqrt(d)), 0).astype(np.float32)
    given = np.stack([noise.apply("uniform", true, rate, k, seed) for rate in (0.2, 0.4, 0.6) for seed in (0, 1)])

    def theirs() -> np.ndarray:
        standard, probs = (x - x.mean(0)) / x.std(0), np.empty((*given.shape, k), np.float32)
        for labels, p in zip(given, probs, strict=True):
            fold = engine.folds(labels, folds, 0)
            for out in (fold == i for i in range(folds)):
                head = LogisticRegression(C=1 / 100, max_iter=1000).fit(standard[~out], labels[~out])
                p[out] = head.predict_proba(standard[out])
        return probs

    return Comparison(
        f"{len(given) * folds} linear heads, {n:,} x {d}, {k} classes",
        lambda: predict.out_of_fold(x, given, k, folds=folds),
        theirs,
        lambda ours, peer: float(np.abs((ours.argmax(2) == true).mean(1) - (peer.argmax(2) == true).mean(1)).max()),
        allowed=0.005,
    )


def knn(n: int, d: int = 512, k: int = 20) -> Comparison:
    """Neighbours by cosine against scikit-learn's brute force, which is fastest on unit rows by Euclidean distance.

    The difference is the share of neighbours that are not the same, which near-equal distances allow.
    """
    from sklearn.neighbors import NearestNeighbors

    x = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)).relu(), dim=1).numpy()

    def theirs() -> np.ndarray:
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors(return_distance=False)

    def difference(ours: np.ndarray, peer: np.ndarray) -> float:
        return 1 - float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(ours, peer, strict=True)]))

    return Comparison(f"{k} neighbours, {n:,} x {d}", lambda: neighbours.nearest(x, k)[1], theirs, difference, 0.001)


@dataclass(frozen=True)
class Line:
    """A row of COMPARISONS: how to build it at a scale, the peer's package, the ratio to reach, how often to run it."""

    build: Callable[[float], Comparison]
    package: str
    aim: float
    rounds: int


def _scaled(function: Callable[..., Comparison], n: int, *rest, **options) -> Callable[[float], Comparison]:
    return lambda scale: function(max(128, round(n * scale)), *rest, **options)


COMPARISONS = {
    "augmentation_torchvision": Line(_scaled(partial(augmentation, "torchvision"), 2048), "torchvision", 5, 7),
    "augmentation_kornia": Line(_scaled(partial(augmentation, "kornia"), 2048), "kornia", 2, 5),
    "confident_learning_200k_10": Line(_scaled(confident_learning, 200_000, 10), "cleanlab", 1, 9),
    "confident_learning_50k_100": Line(_scaled(confident_learning, 50_000, 100), "cleanlab", 1, 9),
    "confident_learning_1m_100": Line(_scaled(confident_learning, 1_000_000, 100), "cleanlab", 10, 9),
    "linear_heads": Line(_scaled(linear_heads, 5000), "scikit-learn", 10, 5),
    "knn_50k_512": Line(_scaled(knn, 50_000), "scikit-learn", 1, 1),
    # last: training has the C library keep memory, which would serve the peers in this process too
    "ssl_epoch_lightly": Line(_scaled(partial(ssl_epoch, "lightly"), 1024), "lightly", 1.5, 5),
    "ssl_epoch_torchvision": Line(_scaled(partial(ssl_epoch, "torchvision"), 1024), "torchvision", 1, 5),
}


def installed(package: str) -> str:
    """Return a peer's distribution and version, as "scikit-learn 1.9.1"; empty if it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def cost(name: str, sizes: Iterable[int]) -> Iterator[tuple[int, float]]:
    """Yield (size, seconds) of the work COSTS[name] at each size: of images in the set, or of pixels a side."""
    for size in sizes:
        work = COSTS[name](size)
        seconds = timed(work)
        yield size, min(seconds, *(timed(work) for _ in range(3 if seconds < 5 else 1)))


def exponent(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """Return e of the least-squares fit seconds = c x size^e, on logarithms."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(seconds)), 1)[0])


def _epoch(n: int, size: int, width: int) -> Callable[[], object]:
    images = peers.random_images(n, size)
    backbone = backbones.build("resnet18", width, images, 0)
    plain = engine.place("cpu", compile_from=math.inf)
    epochs = pretrain.train(backbone, images, "simclr", epochs=10_000, batch_size=256, projection=64, place=plain)
    return lambda: next(epochs)


def _detection(n: int) -> Callable[[], object]:
    labels, probs = random_probs(n, 10)
    return lambda: label_errors.detect("confident_learning", labels, probs)


def _heads(n: int) -> Callable[[], object]:
    labels, probs = random_probs(n, 10)
    x = np.random.default_rng(0).normal(size=(n, 64)).astype(np.float32)
    x[:, :10] += 10 * probs
    return lambda: predict.out_of_fold(x, labels, 10)


COSTS = {
    "SSL epoch": lambda n: _epoch(n, size=8, width=4),
    "two views": lambda n: augmentation("kornia", n).ours,
    "confident learning": _detection,
    "linear heads": _heads,
    "neighbours (brute force)": lambda n: knn(n, 128).ours,
    "SSL epoch against image size": lambda size: _epoch(256, size=size, width=16),
}


def flops(backbone: nn.Module, size: int, channels: int = 3) -> float:
    """Return the floating-point operations of one view, forward and backward; a multiply-add counts as two."""
    device = next(backbone.parameters()).device
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(2, channels, size, size, device=device)).sum().backward()
    return counter.get_total_flops() / 2


def peak(place: engine.Place, n: int = 4096, channels: int = 256) -> float:
    """Return the most operations a second seen of a product of n x n matrices and of a wide 3x3 convolution.

    On some processors the library of the one is faster, on some that of the other. The best of ten runs each.
    """
    product, filters = place.put(nn.Linear(n, n, bias=False)), place.put(nn.Conv2d(channels, channels, 3, bias=False))
    rows, images = torch.ones(n, n, device=place.device), place.batch(torch.ones(64, channels, 34, 34))
    work = [(lambda: product(rows), 2 * n**3), (lambda: filters(images), 2 * 64 * 32**2 * 9 * channels**2)]
    with place.autocast(), torch.inference_mode():
        return max(operations / min(timed(run) for _ in range(10)) for run, operations in work)
