"""How cost grows with the number of images: exponents, and what a million to a billion images would take and need."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from ptglab.errors import InputError

FIGURES = Path(__file__).parents[2] / "figures"  # of a checkout, where measurements lie
ALL = "all stages"
EPOCHS = 200  # of pre-training
FORWARD = 1 / 6  # of a training step's work on an image is one view forward: two views, and backward twice as much
# What machines are taken to be; only these are not measured
MACHINE = 8  # GPUs at most
CORES, MEMORY, DISK, READ = 16, 128e9, 4e12, 3e9  # cores a GPU; bytes of memory and of disk, and read from it a second
BATCH, LARGEST_BATCH = 512, 32_768  # images a GPU; all together, beyond which accuracy falls (arXiv 1708.03888)
PATIENCE = 7 * 24  # hours of one stage that are too many


def read(name: str) -> pd.DataFrame:
    """Return the measurements figures/`name`.csv of a checkout. Raises InputError where there are none."""
    path = FIGURES / f"{name}.csv"
    if not path.is_file():
        raise InputError(f"there is no {path}, where measurements lie: run from a checkout of ptglab")
    return pd.read_csv(path)


def seconds(frame: pd.DataFrame) -> pd.DataFrame:
    """Return CPU seconds [sizes, stages] of `frame`, the rows of scale.csv, and of all stages together.

    What was measured on a sample of the images counts in proportion.
    """
    timed = frame[frame["cpu_seconds"].notna()]
    timed = timed.assign(cpu_seconds=timed["cpu_seconds"] * timed["images"] / timed["measured"])
    table = timed.pivot_table(index="images", columns="stage", values="cpu_seconds", aggfunc="sum", sort=False)
    return table.assign(**{ALL: table.sum(axis=1)})


def curves(frame: pd.DataFrame) -> dict[str, tuple[list[int], list[float]]]:
    """Return {stage: (images, CPU seconds)}, detectors together and tables with loading, for `figures.scaling`."""
    table = seconds(frame)
    detectors = list(frame.loc[frame["precision"].notna(), "stage"].unique())
    for name, parts in {"detection": detectors, "loading and tables": ["load again", "tables and gallery"]}.items():
        table = table.assign(**{name: table[parts].sum(axis=1)}).drop(columns=parts)
    return {name: (list(table.index), list(table[name])) for name in [*table.columns.drop(ALL), ALL]}


def exponents(frame: pd.DataFrame) -> pd.Series:
    """Return the exponent of each of `curves` in the number of images, by least squares on logarithms."""
    return pd.Series({name: np.polyfit(np.log(n), np.log(s), 1)[0] for name, (n, s) in curves(frame).items()})


def predicted(frame: pd.DataFrame) -> pd.DataFrame:
    """Check the extrapolation: what the smaller sizes say of the largest, beside what it took, CPU seconds a stage."""
    largest, found = frame["images"].max(), curves(frame)
    rows = {}
    for name, (images, spent) in found.items():
        slope, start = np.polyfit(np.log(images[:-1]), np.log(spent[:-1]), 1)
        rows[name] = {"predicted": np.exp(start + slope * np.log(largest)), "measured": spent[-1]}
    table = pd.DataFrame(rows).T
    return table.assign(ratio=table["measured"] / table["predicted"])


def cost(
    frame: pd.DataFrame, gpu: pd.Series, images: Iterable[int] = (10**6, 10**8, 10**9),
    gpus: Iterable[int] = (1, 8, 1000), trained_on: int = 50_000,
) -> pd.DataFrame:  # fmt: skip
    """Return a row for each stage, number of images and of GPUs: hours, bytes it leaves, and what breaks.

    frame: the rows of scale.csv, measured on CPU cores, of which each GPU brings CORES; a stage's CPU seconds grow from
    the largest size on in proportion, neighbours by their exponent between the two largest. gpu: a row of
    ssl_quality.csv, whose epoch is of `trained_on` images. Pre-training (EPOCHS) and features take their share of its
    seconds on every GPU, as if nothing were lost between them.
    """
    table, largest = seconds(frame), frame["images"].max()
    spent, before = table.loc[largest], table.iloc[-2]
    rows_of = frame[frame["images"] == largest].groupby("stage")["bytes"].max()
    growth = np.log(spent["neighbours"] / before["neighbours"]) / np.log(largest / table.index[-2])
    epoch = gpu["seconds_an_epoch"] / trained_on  # seconds an image
    stages = [s for s in table.columns if s not in ("features", ALL)]
    found = []
    for n in images:
        for g in gpus:
            work = {"pre-training": EPOCHS * epoch * n / g, "features": FORWARD * epoch * n / g}
            for stage in stages:
                power = growth if stage == "neighbours" else 1
                work[stage] = spent[stage] * (n / largest) ** power / (CORES * g)
            for stage, took in work.items():
                left = rows_of.get(stage, np.nan) * n / largest
                found.append({"images": n, "gpus": g, "stage": stage, "hours": took / 3600, "bytes": left})
    return pd.DataFrame(found)


def breaks(frame: pd.DataFrame, gpu: pd.Series, costs: pd.DataFrame, trained_on: int = 50_000) -> pd.DataFrame:
    """Return what breaks first for each number of images and of GPUs, and what would be used instead.

    costs: what `cost` returns. Limits are those of ptglab as it is today, one process on each machine that has all
    images: its memory, which grows as between the two largest sizes; its disk; how fast it reads pixels, once memory
    holds them no more; the batch of all GPUs; PATIENCE. share: what is needed of what there is, the largest one;
    above 1 it breaks; also: what else does.
    """
    peaks = frame.groupby("images")["peak"].max()
    resident = (peaks.iloc[-1] - peaks.iloc[-2]) / (peaks.index[-1] - peaks.index[-2])
    left = frame[frame["images"] == peaks.index[-1]].groupby("stage")["bytes"].max() / peaks.index[-1]  # bytes an image
    epoch, rows = gpu["seconds_an_epoch"] / trained_on, []
    for (n, g), part in costs.groupby(["images", "gpus"]):
        pixels = left["cache of pixels"]
        needs = {
            "memory": (peaks.iloc[-1] + resident * (n - peaks.index[-1])) / MEMORY,
            "disk": left.sum() * n / DISK,
            "reading": (pixels * n > MEMORY / 2) * min(g, MACHINE) * pixels / epoch / READ,
            "batch": BATCH * g / LARGEST_BATCH,
            **{f"time of {stage}": took / PATIENCE for stage, took in part.set_index("stage")["hours"].items()},
        }
        worst = sorted(needs, key=needs.get, reverse=True)
        broken = [name for name in worst if needs[name] > 1]
        rows.append({"images": n, "gpus": g, "hours": part["hours"].sum(), "first": broken[0] if broken else "nothing",
                     "share": needs[worst[0]], "also": ", ".join(broken[1:]),
                     "instead": INSTEAD[broken[0]] if broken else ""})  # fmt: skip
    return pd.DataFrame(rows)


INSTEAD = {
    "memory": "ids, labels and neighbours in shards, a process each; an index of compressed vectors (IVF-PQ)",
    "disk": "pixels stay in their shards (WebDataset, parquet) and are decoded as they stream",
    "reading": "each machine its own shards, drawn within a window instead of over all",
    "batch": "fewer GPUs a network, and several networks (seeds, widths) side by side",
    "time of pre-training": "more GPUs or fewer epochs: an epoch of a large set shows as much as many of a small one",
    "time of features": "more GPUs",
    "time of cache of pixels": "more machines, each its shards; decoding on the GPU (DALI)",
    "time of load again": "ids and labels in Arrow, not in Python's lists",
    "time of linear heads": "heads by stochastic steps on the GPU, a fold a process",
    "time of neighbours": "a compressed index on GPUs, in shards (faiss IVF-PQ), or the neighbours of a sample",
    "time of tables and gallery": "parquet by shard instead of one CSV",
    **{f"time of {name}": "each shard alone: two passes, of which only K numbers are shared" for name in
       ("confidence", "disagreement", "confident_learning", "knn")},
}  # fmt: skip
