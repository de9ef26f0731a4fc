"""A million images audited from their features in less than 4 GB, in a process of its own.

    python -m pytest -m bench tests/bench/test_memory.py

Features and images lie in files that are mapped, as an audit leaves them. Neighbours are left out: they cost N squared.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

N, MOST = 1_000_000, 4e9  # bytes that are resident at most

AUDIT = """
import json, resource, sys, time
from pathlib import Path
import ptglab
import numpy as np
import torch
from ptglab import data
from ptglab.audit import exports
from ptglab.detect import label_errors
from ptglab.train import predict

folder, n, k = Path(sys.argv[1]), int(sys.argv[2]), 10
draws = np.random.default_rng(0)
true = draws.integers(0, k, n)
given = np.where(draws.random(n) < 0.2, (true + draws.integers(1, k, n)) % k, true)
centres = draws.normal(size=(k, 32)).astype(np.float32)
features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (n, 32))
for start in range(0, n, 50_000):
    rows = slice(start, start + 50_000)
    features[rows] = centres[true[rows]] + draws.normal(0, 0.8, (len(true[rows]), 32))
features.flush()
pixels = np.memmap(folder / "images", np.uint8, "w+", shape=(n, 3, 32, 32))
del features
features = np.load(folder / "features.npy", mmap_mode="r")
told, began = {}, time.perf_counter()


def tell(name):
    global began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told[name] = {"peak": peak, "seconds": time.perf_counter() - began}
    began = time.perf_counter()


tell("made")
probs = predict.out_of_fold(features, given, k)
tell("out of fold")
wrong = given != true
for name in ("confidence", "disagreement", "confident_learning"):
    suspects = label_errors.detect(name, given, probs)
    tell(name)
    told[name]["precision"] = float(wrong[suspects.flagged].mean())
    told[name]["recall"] = float(suspects.flagged[wrong].mean())
names = [str(i) for i in range(k)]
image_set = data.ImageSet(torch.from_numpy(pixels), given, None, names, [f"{i % 100}/{i}.png" for i in range(n)])
exports.write_csv(folder / "suspects.csv", exports.table(image_set, suspects))
tell("suspects.csv")
exports.gallery(folder / "gallery.html", image_set, suspects, "a million", "confident_learning")
tell("gallery.html")
print(json.dumps(told))
"""


def audit(folder: Path, n: int) -> dict[str, dict]:
    """Return {stage: its seconds, and the peak of resident bytes so far} for `n` images; files go to `folder`."""
    done = subprocess.run([sys.executable, "-c", AUDIT, str(folder), str(n)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.bench
def test_a_million_images_take_less_than_4_gb(tmp_path, capsys):
    told = audit(tmp_path, N)
    with capsys.disabled():
        print(f"\n{N:,} images of 32 x 32 with 32 features, 10 classes, 20 % wrong")
        for name, row in told.items():
            found = f"  precision {row['precision']:.3f}, recall {row['recall']:.3f}" if "precision" in row else ""
            print(f"  {name:20} {row['seconds']:7.1f} s   peak so far {row['peak'] / 1e9:.2f} GB{found}")
    with open(tmp_path / "suspects.csv") as file:
        assert sum(1 for _ in file) == N + 1
    assert max(row["peak"] for row in told.values()) < MOST
    assert all(row["precision"] > 0.5 and row["recall"] > 0.8 for row in told.values() if "precision" in row)


GB = 1e9
CEILINGS = {  # of the resident memory of a command and all its processes together, on the embedded digits
    "doctor": (1.5 * GB, ["doctor"]),
    "doctor --determinism": (2.5 * GB, ["doctor", "--determinism"]),
    "audit": (3 * GB, ["audit", "digits", "--out", "audit"]),
    "run": (3 * GB, ["run", "02_pretrain", "02.ipynb", "-p", "data_run=", "-p", "epochs=3"]),
    "sweep": (4 * GB, ["sweep", "smoke", "--out", "sweep", "--jobs", "1"]),
    "demo": (3 * GB, ["demo", "--out", "demo"]),
}


def peak_of(command: list[str], folder: Path) -> float:
    """Run `ptglab` with arguments in `folder`; return the largest sum of resident bytes of it and all below it."""
    code = "import sys; from ptglab.cli import main; sys.argv[0] = 'ptglab'; main()"
    process, peak = subprocess.Popen([sys.executable, "-c", code, *command], cwd=folder, stdout=subprocess.DEVNULL), 0.0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.bench
@pytest.mark.parametrize("name", CEILINGS)
def test_commands_stay_below_their_ceilings(name, tmp_path, capsys):
    most, command = CEILINGS[name]
    peak = peak_of(command, tmp_path)
    with capsys.disabled():
        print(f"\nptglab {name}: {peak / GB:.2f} GB at the peak, {most / GB:.1f} GB allowed")
    assert peak < most
