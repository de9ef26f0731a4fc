"""From shards to suspects at a million images; each function runs in a process of its own, whose memory is measured."""

import io
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from ptglab import data, files
from ptglab.audit import exports
from ptglab.data import cache
from ptglab.detect import label_errors, neighbours
from ptglab.train import backbones, engine, predict

DETECTORS = ("confidence", "disagreement", "confident_learning", "knn")


def shard(path: Path, number: int, n: int) -> None:
    """Write a parquet file of `n` digits as 32 x 32 PNG: enlarged, moved, tinted, 20 % of the labels wrong."""
    digits, rng = load_digits(), np.random.default_rng(number)
    small = np.clip(digits.images * 16, 0, 255).astype(np.uint8).repeat(3, 1).repeat(3, 2)  # 24 x 24
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("given", pa.int64()), ("label", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, n, 5000):
            m = min(5000, n - start)
            chosen, tint = rng.integers(0, len(small), m), rng.integers(160, 256, (m, 3))
            places, encoded = rng.integers(3, 6, (m, 2)), []
            for digit, colour, (x, y) in zip(small[chosen], tint, places, strict=True):
                pixels, png = np.zeros((32, 32, 3), np.uint8), io.BytesIO()
                pixels[y : y + 24, x : x + 24] = (digit[..., None] * colour >> 8).astype(np.uint8)
                Image.fromarray(pixels).save(png, "PNG", compress_level=1)
                encoded.append({"bytes": png.getvalue(), "path": None})
            true = digits.target[chosen]
            given = np.where(rng.random(m) < 0.2, (true + rng.integers(1, 10, m)) % 10, true)
            writer.write_table(pa.table({"image": encoded, "given": given, "label": true}, schema))


def used(kind: int) -> tuple[float, int]:
    """Return (CPU seconds, bytes that were resident at most) of this process or of its children."""
    usage = resource.getrusage(kind)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def audit(folder: Path, n: int) -> list[dict]:
    """Return a row for each stage of an audit of the `n` images in folder/shards, as they are in scale.csv."""
    rows = []

    @contextmanager
    def stage(name: str) -> Iterator[dict]:
        row = {"images": n, "stage": name, "measured": n}
        wall, cpu = time.perf_counter(), used(resource.RUSAGE_SELF)[0] + used(resource.RUSAGE_CHILDREN)[0]
        yield row
        (mine, peak), (theirs, most) = used(resource.RUSAGE_SELF), used(resource.RUSAGE_CHILDREN)
        row |= {"seconds": time.perf_counter() - wall, "cpu_seconds": mine + theirs - cpu, "peak": peak}
        rows.append(row | ({"peak_of_processes": most} if name == "cache of pixels" else {}))

    with patch.object(cache, "LARGE", 0):  # every size goes the way of large sets
        with stage("cache of pixels") as row:
            images = data.load(folder / "shards", labels="given")
        with stage("load again"):
            images = data.load(folder / "shards", labels="given")
    rows[0]["bytes"] = sum(file.stat().st_size for file in cache.root().rglob("*") if file.is_file())
    given, true = images.labels_given, images.labels_true
    network = backbones.build("resnet18", 8, images.images[:8], 0)
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (n, network.num_features))
    with stage("features") as row:
        predict.features(network, images.images, engine.prepare("cpu"), features)
        row["bytes"] = features.nbytes
    features = np.load(folder / "features.npy", mmap_mode="r")
    found = neighbours.nearest(features[:500], 20)  # once unmeasured: compilers and libraries start
    probs = predict.out_of_fold(features[:500], given[:500], 10)
    for name in DETECTORS:
        label_errors.detect(name, given[:500], probs, neighbours=found)
    with stage("linear heads") as row:
        np.save(folder / "probs.npy", predict.out_of_fold(features, given, 10))
        row["bytes"] = (folder / "probs.npy").stat().st_size
    probs = np.load(folder / "probs.npy", mmap_mode="r")
    with stage("neighbours") as row:
        found = neighbours.nearest(features, 20)
        row["bytes"] = sum(part.nbytes for part in found)
    asked = np.sort(np.random.default_rng(2).permutation(n)[:1000])
    exact = neighbours.nearest(features[asked], 21, bank=features)[1]  # few enough rows to compare all pairs
    shared = [len(np.intersect1d(f, e[e != i])) for i, f, e in zip(asked, found[1][asked], exact, strict=True)]
    row["recall"] = np.mean(shared) / 20
    wrong = given != true
    for name in DETECTORS:
        with stage(name) as row:
            suspects = label_errors.detect(name, given, probs, neighbours=found)
            row |= {"precision": wrong[suspects.flagged].mean(), "recall": suspects.flagged[wrong].mean()}
    with stage("tables and gallery") as row:
        files.write_csv(folder / "suspects.csv", exports.table(images, suspects))
        exports.gallery(folder / "gallery.html", images, suspects, "scale", "knn")
        row["bytes"] = sum((folder / name).stat().st_size for name in ("suspects.csv", "gallery.html"))
    return rows


def neighbours_of_many() -> tuple[float, float]:
    """Return (seconds, GB resident at most) of 20 neighbours among 200,000 x 512 features."""
    x = np.random.default_rng(0).standard_normal((200_000, 512), np.float32)
    start = time.perf_counter()
    neighbours.nearest(x, 20)
    return time.perf_counter() - start, used(resource.RUSAGE_SELF)[1] / 1e9
