"""Every comparison at full size: `make bench`. Prints and keeps a line `name ours peer ratio` for each."""

import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import speed
import torch
from matplotlib.figure import Figure

from ptglab.lab import figures, runs

OUT = Path("runs/bench")


@pytest.fixture(scope="module")
def lines(request):
    """A list of the comparisons' figures, printed, kept and drawn at the end."""
    found = []
    yield found
    if not found:
        return
    frame = pd.DataFrame(found)
    OUT.mkdir(parents=True, exist_ok=True)
    frame.to_csv(OUT / "speed.csv", index=False)
    draw(frame)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nours and the peer in turn, medians in seconds; {frame['device'][0]}; kept in {OUT}")
        print(f"{'name':28} {'ours':>9} {'peer':>9} {'ratio':>7}  (range)        work; peer; difference of results")
        for row in found:
            print(f"{row['name']:28} {row['ours']:9.4f} {row['peer']:9.4f} {row['ratio']:7.2f}  "
                  f"({row['lowest_ratio']:.1f} to {row['highest_ratio']:.1f})  {row['work']}; {row['package']}; "
                  f"{row['difference']:g}")  # fmt: skip


def draw(frame: pd.DataFrame) -> None:
    """Draw the ratios of `speed.csv`."""
    figures.style()
    figure = Figure(figsize=(9, 4.2))
    ax = figure.add_subplot()
    ranges = frame[["ratio", "lowest_ratio", "highest_ratio"]].to_numpy().T
    figures.ratios(ax, list(frame["work"] + " / " + frame["package"]), *ranges)
    ax.set_title("How many times faster than the peer, on the same work", loc="left")
    figures.caption(figure, on=frame["device"][0], torch=frame["torch_version"][0], commit=frame["commit"][0])
    figure.savefig(OUT / "speed.png", dpi=150, bbox_inches="tight")


@pytest.mark.bench
@pytest.mark.parametrize("name", speed.COMPARISONS)
def test_beside_the_peer(name, benchmark, lines):
    """The same result, at least `aim` times as fast: ours and the peer in turn, the first round of each unmeasured."""
    warnings.simplefilter("ignore")  # the peers' own
    line = speed.COMPARISONS[name]
    comparison, peer, results = line.build(1.0), [], {}

    def theirs() -> None:
        peer.append(speed.timed(lambda: results.update(peer=comparison.peer())))

    def ours() -> None:
        results["ours"] = comparison.ours()

    benchmark.pedantic(ours, setup=theirs, rounds=line.rounds, warmup_rounds=1)
    measured = speed.summary(benchmark.stats.stats.data, peer[1:])
    difference = comparison.difference(results["ours"], results["peer"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(
        {"name": name} | measured | {"difference": difference, "work": comparison.work, "rounds": line.rounds,
         "package": speed.installed(line.package), "device": runs.hardware(device)} | runs.stamp()
    )  # fmt: skip
    assert difference <= comparison.allowed
    if device.type == "cpu":
        assert measured["ratio"] >= line.aim


@pytest.mark.bench
@pytest.mark.parametrize("name", ["SSL epoch", "two views", "confident learning", "linear heads"])
def test_cost_grows_no_faster_than_the_images(name, capsys):
    """From 2,000 to 200,000 images: the exponent of seconds = c x images^e."""
    sizes, seconds = zip(*speed.cost(name, (2_000, 6_300, 20_000, 63_200, 200_000)), strict=True)
    found = speed.exponent(sizes, seconds)
    with capsys.disabled():
        print(f"\n{name}: {seconds[0]:.3f} to {seconds[-1]:.2f} s for 2,000 to 200,000 images, exponent {found:.2f}")
    assert found <= 1.05


NEIGHBOURS = """
import resource, time
import numpy as np
from ptglab.detect import neighbours
x = np.random.default_rng(0).standard_normal((200_000, 512), np.float32)
start = time.perf_counter()
neighbours.nearest(x, 20)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.bench
def test_neighbours_of_200_000_images_fit_into_2_gb(capsys):
    """The whole process, features and interpreter included; a matrix of all similarities would be 160 GB."""
    done = subprocess.run([sys.executable, "-c", NEIGHBOURS], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.split())
    with capsys.disabled():
        print(f"\n20 neighbours, 200,000 x 512: {seconds:.0f} s, {gigabytes:.2f} GB at the peak")
    assert gigabytes < 2
