"""Time, memory and disk from parquet shards to suspects at up to a million images of 32 x 32: `make scale`.

Each size is a process of its own. Leaves runs/scale/scale.csv, which notebook 8 draws.
"""

import os
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import million
import pandas as pd
import pytest
import scale

from ptglab.lab import runs

SIZES = [int(n) for n in os.environ.get("PTGLAB_SIZES", "10000,100000,1000000").split(",")]
OUT = Path("runs/scale")
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # conftest sets one
MOST, EXPONENT = 4e9, 1.1  # bytes resident at most; of all CPU time against the number of images
SHARD = 50_000  # images


@pytest.mark.bench
def test_cost_grows_as_the_number_of_images_and_memory_stays_below_4_gb(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))
    rows, spawn = [], get_context("spawn")
    for n in SIZES:
        shards = tmp_path / str(n) / "shards"
        shards.mkdir(parents=True)
        monkeypatch.setenv("PTGLAB_CACHE", str(tmp_path / str(n) / "cache"))
        parts = [(i, min(SHARD, n - start)) for i, start in enumerate(range(0, n, SHARD))]
        with ProcessPoolExecutor(2, spawn) as pool:
            paths = [shards / f"train-{i:05d}.parquet" for i, _ in parts]
            list(pool.map(million.shard, paths, *zip(*parts, strict=True)))
        size = sum(path.stat().st_size for path in paths)
        rows.append({"images": n, "stage": "shards", "measured": n, "bytes": size})
        with ProcessPoolExecutor(1, spawn) as pool:
            rows += pool.submit(million.audit, shards.parent, n).result()
    device = f"cpu {platform.machine()}, {THREADS} threads"
    frame = pd.DataFrame(rows).assign(device=device, **runs.stamp())
    OUT.mkdir(parents=True, exist_ok=True)
    frame.to_csv(OUT / "scale.csv", index=False)
    building = frame[frame["stage"] == "cache of pixels"]  # the processes that decode count too
    peak = max(frame["peak"].max(), (building["peak"] + THREADS * building["peak_of_processes"]).max())
    exponents = pd.DataFrame({"all sizes": scale.exponents(frame),
                              "the larger": scale.exponents(frame[frame["images"] > SIZES[0]])})  # fmt: skip
    with capsys.disabled():
        print(f"\n{frame.drop(columns=['device', 'torch_version', 'commit']).round(3).to_string()}\n\nexponents\n"
              f"{exponents.round(3).to_string()}\nresident at most {peak / 1e9:.2f} GB")  # fmt: skip
    found = frame[frame["precision"].notna()]
    assert (found[["precision", "recall"]] > 0.5).all(axis=None)
    assert frame.loc[frame["stage"] == "neighbours", "recall"].min() > 0.9
    assert peak < MOST and exponents.loc[scale.ALL].max() <= EXPONENT
