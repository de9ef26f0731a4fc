"""Every comparison at full size: `make bench`. Prints and keeps a line `name ours peer ratio` for each."""

import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import million
import pandas as pd
import pytest
import speed
import torch

from ptglab.lab import runs

OUT = Path("runs/bench")
pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def lines(request):
    """A list of the measured lines, printed and kept at the end."""
    found = []
    yield found
    if not found:
        return
    frame = pd.DataFrame(found)
    OUT.mkdir(parents=True, exist_ok=True)
    frame.to_csv(OUT / "speed.csv", index=False)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nours and the peer in turn, medians in seconds; {frame['device'][0]}; kept in {OUT}")
        print(f"{'name':28} {'ours':>9} {'peer':>9} {'ratio':>7}  (range)        work; peer; difference of results")
        for row in found:
            print(f"{row['name']:28} {row['ours']:9.4f} {row['peer']:9.4f} {row['ratio']:7.2f}  "
                  f"({row['lowest_ratio']:.1f} to {row['highest_ratio']:.1f})  {row['work']}; {row['package']}; "
                  f"{row['difference']:g}")  # fmt: skip


@pytest.mark.parametrize("name", speed.COMPARISONS)
def test_beside_the_peer(name, lines):
    """The same result, and at least `aim` times as fast."""
    warnings.simplefilter("ignore")  # the peers' own
    line = speed.COMPARISONS[name]
    comparison = line.at(1.0)
    measured = speed.measure(comparison, line.rounds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"work": comparison.work, "rounds": line.rounds, "package": speed.installed(line.package)}
    lines.append({"name": name} | measured | about | {"device": runs.hardware(device)} | runs.stamp())
    assert measured["difference"] <= comparison.allowed
    assert measured["ratio"] >= line.aim or device.type == "cuda"


def test_neighbours_of_200_000_images_fit_into_2_gb(capsys):
    """The whole process, features and interpreter included; a matrix of all similarities would be 160 GB."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        seconds, gigabytes = pool.submit(million.neighbours_of_many).result()
    with capsys.disabled():
        print(f"\n20 neighbours, 200,000 x 512: {seconds:.0f} s, {gigabytes:.2f} GB at the peak")
    assert gigabytes < 2
