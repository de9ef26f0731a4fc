"""Comparisons in speed: ours beside the peers, on the same work, in turn."""

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import peers
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

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
    """Run ours and the peer in turn, `rounds` times each after one unmeasured round, and return a `summary`."""
    results = comparison.ours(), comparison.peer()
    seconds = [(timed(comparison.ours), timed(comparison.peer)) for _ in range(rounds)]
    return summary(*zip(*seconds, strict=True)) | {"difference": comparison.difference(*results)}


def summary(ours: Iterable[float], peer: Iterable[float]) -> dict[str, float]:
    """Return the medians `ours` and `peer` of seconds [R] measured in turn, their `ratio` and its range over rounds."""
    ours, peer = np.array(ours), np.array(peer)
    medians = {"ours": np.median(ours), "peer": np.median(peer), "ratio": np.median(peer) / np.median(ours)}
    return medians | {"lowest_ratio": (peer / ours).min(), "highest_ratio": (peer / ours).max()}


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of one call, including the GPU's work."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch and the libraries of NumPy and SciPy with one thread inside the `with` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def augmentation(peer: str, n: int, size: int = 32, batch_size: int = 512) -> Comparison:
    """Compare two views of `n` images: ours and kornia's by the batch, torchvision's by the image in a loader."""
    images, rng = peers.random_images(n, size), engine.generator("cpu", 0, "speed")

    def ours() -> None:
        for batch in images.split(batch_size):
            augment.two_views(batch, "simclr", rng)

    if peer == "kornia":
        change = peers.kornia_views(size)
        theirs = lambda: [change(b.float() / 255) for b in images.split(batch_size) for _ in range(2)]  # noqa: E731
    else:
        views = peers.TwoViews(images, peers.torchvision_views(size))
        batches = peers.loader(views, min(batch_size, n // engine.threads()))
        theirs = lambda: [None for _ in batches]  # noqa: E731
    return Comparison(f"two views of {n:,} images of {size} pixels", ours, theirs)


def ssl_epoch(
    peer: str, n: int, size: int = 32, width: int = 16, batch_size: int = 256, place: engine.Place | None = None,
    method: str = "simclr",
) -> Comparison:  # fmt: skip
    """Compare one epoch of `method` by `pretrain.train` with the same network in the peer's loop, fed by a loader.

    lightly: SimCLR only, its transform and its loss, one forward a view, the default memory format, in a process of its
    own, as it runs without ptglab. torchvision: transforms v2, and the rest as ours, so that only the feeding differs.
    """
    place, images = place or engine.prepare(), peers.random_images(n, size)
    batch_size = min(batch_size, n // engine.threads())
    backbone = backbones.build("resnet18", width, images, 0)
    ours = pretrain.train(backbone, images, method, epochs=peers.EPOCHS, batch_size=batch_size, place=place)
    options = (peer, n, size, width, batch_size, place, method)
    alone = ProcessPoolExecutor(1, get_context("spawn"))
    there = {"torchvision": lambda: peers.run_epoch(*options),
             "lightly": lambda: alone.submit(peers.run_epoch, *options).result()}  # fmt: skip
    return Comparison(f"{method} epoch, {n:,} images of {size} pixels, width {width}", lambda: next(ours), there[peer])


def confident_learning(n: int, k: int) -> Comparison:
    """Compare the detector with cleanlab's `find_label_issues`; the difference is how many flags differ."""
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
    rng = np.random.default_rng(seed)
    true = rng.integers(0, k, n)
    probs = rng.random((n, k), np.float32) ** 8
    probs[np.arange(n), true] += 3 * rng.random(n, np.float32)
    probs /= probs.sum(1, keepdims=True)
    return np.where(rng.random(n) < 0.3, rng.integers(0, k, n), true), probs


def linear_heads(n: int, d: int = 128, k: int = 10, folds: int = 5, threads: int = 1) -> Comparison:
    """Compare out-of-fold heads, of three noise rates and two seeds, with scikit-learn's, fitted one by one.

    threads: 1, or 0 for as many as each chooses by itself. The difference is the largest one in accuracy on the true
    classes, over the versions of the labels.
    """
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    true = rng.integers(0, k, n)
    x = rng.normal(size=(k, d))[true] * 0.35 + rng.normal(size=(n, d))
    x = np.maximum(x @ (np.eye(d) + 0.3 * rng.normal(size=(d, d)) / np.sqrt(d)), 0).astype(np.float32)
    given = np.stack([noise.apply("uniform", true, rate, k, seed) for rate in (0.2, 0.4, 0.6) for seed in (0, 1)])
    limited = one_thread if threads else nullcontext

    def ours() -> np.ndarray:
        with limited():
            return predict.out_of_fold(x, given, k, folds=folds)

    def theirs() -> np.ndarray:
        standard, probs = (x - x.mean(0)) / np.sqrt(x.var(0).mean()), np.empty((*given.shape, k), np.float32)
        with limited():
            for labels, p in zip(given, probs, strict=True):
                fold = engine.folds(labels, folds, 0)
                for out in (fold == i for i in range(folds)):
                    head = LogisticRegression(C=1 / 100, max_iter=1000).fit(standard[~out], labels[~out])
                    p[out] = head.predict_proba(standard[out])
        return probs

    def difference(ours: np.ndarray, peer: np.ndarray) -> float:
        return float(np.abs((ours.argmax(2) == true).mean(1) - (peer.argmax(2) == true).mean(1)).max())

    on = "one thread each" if threads else "default threads"
    return Comparison(f"{len(given) * folds} linear heads, {n:,} x {d}, {k} classes, {on}", ours, theirs, difference,
                      allowed=0.005)  # fmt: skip


def knn(n: int, d: int = 512, k: int = 20) -> Comparison:
    """Compare neighbours by cosine with scikit-learn's brute force, which is fastest on unit rows by distance.

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
    """A row of COMPARISONS: a function of the size, the full size, the peer, the ratio to reach, how often to run."""

    build: Callable[[int], Comparison]
    n: int
    package: str
    aim: float
    rounds: int

    def at(self, scale: float) -> Comparison:
        return self.build(max(128, round(self.n * scale)))


COMPARISONS = {
    "augmentation_torchvision": Line(partial(augmentation, "torchvision"), 2048, "torchvision", 5, 7),
    "augmentation_kornia": Line(partial(augmentation, "kornia"), 2048, "kornia", 2, 5),
    "confident_learning_200k_10": Line(partial(confident_learning, k=10), 200_000, "cleanlab", 1, 9),
    "confident_learning_50k_100": Line(partial(confident_learning, k=100), 50_000, "cleanlab", 1, 9),
    "confident_learning_1m_100": Line(partial(confident_learning, k=100), 1_000_000, "cleanlab", 1, 9),
    "linear_heads": Line(linear_heads, 5000, "scikit-learn", 1, 5),  # the headline: one thread each
    "linear_heads_default_threads": Line(partial(linear_heads, threads=0), 5000, "scikit-learn", 1, 5),
    "knn_50k_512": Line(knn, 50_000, "scikit-learn", 1, 1),
    # last: training makes the C library keep memory, which would serve the peers in this process too
    "ssl_epoch_lightly": Line(partial(ssl_epoch, "lightly"), 1024, "lightly", 1, 5),
    "ssl_epoch_torchvision": Line(partial(ssl_epoch, "torchvision"), 1024, "torchvision", 1, 5),
}


def installed(package: str) -> str:
    """Return a peer's distribution and version, as "scikit-learn 1.9.1"; empty if it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""
