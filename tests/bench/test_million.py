"""From parquet shards to suspects at 10,000, 100,000 and a million images of 32 x 32: time, memory, disk; `make scale`.

    python -m pytest -m bench tests/bench/test_million.py

Digits, enlarged, moved, tinted and encoded as PNG, 20 % of the labels wrong. Each size is a process of its own, warmed
up, and goes the way of large sets. A narrow network takes the features of at most 20,000 images; those of the others
are drawn between the features of two images of their class. Leaves runs/scale: scale.csv and scale.png.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import scale
from matplotlib.figure import Figure

from ptglab.lab import figures, runs

SIZES = [int(n) for n in os.environ.get("PTGLAB_SIZES", "10000,100000,1000000").split(",")]
OUT = Path("runs/scale")
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # conftest has one
MOST, EXPONENT = 4e9, 1.1  # bytes that are resident at most; of all time against the number of images

SHARD = """
import io, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

path, number, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
digits = load_digits()
draws = np.random.default_rng(number)
small = np.clip(digits.images * 16, 0, 255).astype(np.uint8).repeat(3, 1).repeat(3, 2)  # 24 x 24
writer, kind = None, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
schema = pa.schema([("image", kind), ("given", pa.int64()), ("label", pa.int64())])
with pq.ParquetWriter(path, schema) as writer:
    for start in range(0, n, 5000):
        m = min(5000, n - start)
        which, tint = draws.integers(0, len(small), m), draws.integers(160, 256, (m, 3))
        dx, dy = draws.integers(3, 6, (2, m))
        images = []
        for i in range(m):
            pixels = np.zeros((32, 32, 3), np.uint8)
            grey = small[which[i]]
            pixels[dy[i] : dy[i] + 24, dx[i] : dx[i] + 24] = (grey[..., None] * tint[i] >> 8).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            images.append({"bytes": file.getvalue(), "path": None})
        true = digits.target[which]
        given = np.where(draws.random(m) < 0.2, (true + draws.integers(1, 10, m)) % 10, true)
        writer.write_table(pa.table({"image": images, "given": given, "label": true}, schema))
"""

AUDIT = """
import json, os, resource, sys, time
from pathlib import Path
import ptglab
import numpy as np
import torch
from ptglab.train import backbones
from ptglab.data import cache
from ptglab import data
from ptglab.train import engine
from ptglab.audit import exports
from ptglab.detect import label_errors
from ptglab.detect import neighbours
from ptglab.train import predict
from ptglab.train import pretrain

folder, n = Path(sys.argv[1]), int(sys.argv[2])
cache.LARGE, rows = 0, []


def usage(kind):
    used = resource.getrusage(kind)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


class stage:
    def __init__(self, name, images=n, **more):
        self.row = {"images": n, "stage": name, "measured": images} | more

    def __enter__(self):
        self.at = time.perf_counter(), usage(resource.RUSAGE_SELF)[0] + usage(resource.RUSAGE_CHILDREN)[0]
        return self.row

    def __exit__(self, *_):
        (mine, peak), (theirs, most) = usage(resource.RUSAGE_SELF), usage(resource.RUSAGE_CHILDREN)
        self.row |= {"seconds": time.perf_counter() - self.at[0], "cpu_seconds": mine + theirs - self.at[1],
                     "peak": peak}
        if self.row["stage"] == "cache of pixels":
            self.row["peak_of_processes"] = most
        rows.append(self.row)
        print(self.row, file=sys.stderr, flush=True)


source = folder / "shards"
with stage("cache of pixels") as row:
    images = data.load(source, labels="given")
row["bytes"] = sum(f.stat().st_size for f in cache.root().rglob("*") if f.is_file())
with stage("load again"):
    images = data.load(source, labels="given")
assert len(images) == n and "pixels are kept" in images.notes[-1]
given, true = images.labels_given, images.labels_true

place, few = engine.place("cpu"), min(n, 20_000)
weights = folder.parent / "model.safetensors"
if weights.exists():
    network, _ = backbones.load(weights)
else:
    network = backbones.build("resnet18", 8, images.images[:8], 0)
    for _ in pretrain.train(network, images.images[:2000], "simclr", epochs=6, batch_size=128, projection=64,
                            augmentation="digits", schedule="short", place=place):
        pass
    backbones.save(weights, network)
features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (n, network.num_features))
with stage("features", few, bytes=features.nbytes):
    predict.features(network, images.images[:few], place, features[:few])
draws, of = np.random.default_rng(1), [np.flatnonzero(true[:few] == j) for j in range(10)]
known, spread = np.array(features[:few]), features[:few].std(0)
for start in range(few, n, 1 << 16):
    classes = true[start : start + (1 << 16)]
    first, second = np.empty((2, len(classes)), np.int64)
    for j, members in enumerate(of):
        first[classes == j], second[classes == j] = draws.choice(members, (2, (classes == j).sum()))
    share = draws.random((len(classes), 1), np.float32) / 2
    noise = 0.1 * spread * draws.standard_normal((len(classes), known.shape[1]), np.float32)
    features[start : start + len(classes)] = (1 - share) * known[first] + share * known[second] + noise
features.flush()
few_near = neighbours.nearest(known[:500], 20)  # compilers and libraries begin their work
warm = predict.out_of_fold(known[:500], given[:500], 10)
warm.flags.writeable = False  # as what is mapped, for which there is other code
for name in ("confidence", "disagreement", "confident_learning", "knn"):
    label_errors.detect(name, given[:500], warm, near=few_near)
neighbours._faiss()
features = np.load(folder / "features.npy", mmap_mode="r")

with stage("linear heads") as row:
    np.save(folder / "probs.npy", predict.out_of_fold(features, given, 10))
probs = np.load(folder / "probs.npy", mmap_mode="r")
row["bytes"] = probs.nbytes
with stage("neighbours") as row:
    near = neighbours.nearest(features, 20)
row["bytes"] = sum(part.nbytes for part in near)
asked = np.sort(draws.permutation(n)[:1000])
exact = neighbours._exact(features[asked], features, 20, asked)[1]
row["recall"] = neighbours.recall(near[1][asked], exact)
wrong = given != true
for name in ("confidence", "disagreement", "confident_learning", "knn"):
    with stage(name) as row:
        suspects = label_errors.detect(name, given, probs, near=near)
    row |= {"precision": wrong[suspects.flagged].mean(), "recall": suspects.flagged[wrong].mean()}
with stage("tables and gallery") as row:
    exports.write_csv(folder / "suspects.csv", exports.table(images, suspects))
    exports.gallery(folder / "gallery.html", images, suspects, "scale", "knn")
row["bytes"] = sum((folder / name).stat().st_size for name in ("suspects.csv", "gallery.html"))
print(json.dumps([{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in rows]))
"""


def shards(folder: Path, n: int) -> int:
    """Generate n images in shards of at most 50,000, two processes at a time; return their bytes."""
    folder.mkdir()
    waiting = [(i, min(50_000, n - start)) for i, start in enumerate(range(0, n, 50_000))]
    while waiting:
        now, waiting = waiting[:2], waiting[2:]
        commands = [[sys.executable, "-c", SHARD, str(folder / f"train-{i:05d}.parquet"), str(i), str(m)]
                    for i, m in now]  # fmt: skip
        assert [process.wait() for process in [subprocess.Popen(command) for command in commands]] == [0] * len(now)
    return sum(path.stat().st_size for path in folder.iterdir())


def draw(frame: pd.DataFrame, path: Path) -> None:
    figures.style()
    figure = Figure(figsize=(11, 4.6))
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    curves, exponents = scale.curves(frame), scale.exponents(frame)
    figures.scaling(left, {f"{name}: {exponents[name]:.2f}": curve for name, curve in curves.items()}, "images")
    left.set(title="CPU seconds of each stage, and their exponent", ylabel="CPU seconds")
    for line, tint in zip(left.lines, [*figures.OTHERS[:5], "#E69F00", figures.INK], strict=True):
        line.set_color(tint)
    left.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    left.set_ylim(top=2 * max(curves[scale.ALL][1]))
    peak = frame.groupby("images")["peak"].max() / 1e9
    figures.scaling(right, {"peak": (list(peak.index), list(peak))}, "images")
    right.get_legend().remove()
    right.set(title="Resident at most", ylabel="GB", yscale="linear", ylim=(0, 4.6))
    right.text(SIZES[0], MOST / 1e9 + 0.05, "the most allowed", fontsize=9, color=figures.MUTED)
    right.yaxis.set_major_formatter("{x:g}")
    right.axhline(MOST / 1e9, color=figures.MUTED, linewidth=1)
    figures.caption(figure, on=frame["device"][0], torch=frame["torch_version"][0], commit=frame["commit"][0])
    figure.savefig(path, dpi=150, bbox_inches="tight")


@pytest.mark.bench
def test_cost_grows_as_the_number_of_images_and_memory_stays_below_4_gb(tmp_path, capsys):
    rows = []
    for n in SIZES:
        folder = tmp_path / str(n)
        folder.mkdir()
        size = shards(folder / "shards", n)
        environment = {**os.environ, "PTGLAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": str(THREADS)}
        done = subprocess.run([sys.executable, "-c", AUDIT, str(folder), str(n)], capture_output=True, text=True,
                              env=environment)  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows += [{"images": n, "stage": "shards", "measured": n, "bytes": size}]
        rows += json.loads(done.stdout.splitlines()[-1])
        with capsys.disabled():
            print(*done.stderr.splitlines(), sep="\n")
    device = f"cpu {platform.machine()}, {THREADS} threads"
    frame = pd.DataFrame(rows).assign(device=device, **runs.stamp())
    OUT.mkdir(parents=True, exist_ok=True)
    frame.to_csv(OUT / "scale.csv", index=False)
    draw(frame, OUT / "scale.png")
    exponents, building = scale.exponents(frame), frame[frame["stage"] == "cache of pixels"]
    # What the system says of processes that decode is too much: it counts what this one had when it started them.
    peak = max(frame["peak"].max(), (building["peak"] + THREADS * building["peak_of_processes"]).max())
    with capsys.disabled():
        print(exponents.round(3).to_string(), f"\nresident at most {peak / 1e9:.2f} GB, all processes together")
    found = frame[frame["precision"].notna()]
    assert (found["precision"] > 0.5).all() and (found["recall"] > 0.5).all()
    assert frame.loc[frame["stage"] == "neighbours", "recall"].min() > 0.9
    assert peak < MOST
    last = scale.exponents(frame[frame["images"] > SIZES[0]])  # fixed costs flatter the smallest
    with capsys.disabled():
        print("the same between the larger sizes\n", last.round(3).to_string(), sep="")
    assert max(exponents["all stages"], last["all stages"]) <= EXPONENT
