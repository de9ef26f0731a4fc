"""Every comparison at full size: `make bench`."""

import warnings

import pytest
import torch

from ptglab import runs, speed


@pytest.mark.bench
@pytest.mark.parametrize("name", speed.COMPARISONS)
def test_beside_the_peer(name, benchmark, report):
    """The same result, at least `aim` times as fast: ours and the peer in turn, the first round of each unmeasured."""
    warnings.simplefilter("ignore")  # the peers' own
    line = speed.COMPARISONS[name]
    comparison, peer, results = line.build(1.0), [], {}

    def theirs() -> None:
        peer.append(speed.timed(lambda: results.update(peer=comparison.peer())))

    def ours() -> None:
        results["ours"] = comparison.ours()

    benchmark.pedantic(ours, setup=theirs, rounds=line.rounds, warmup_rounds=1)
    figures = speed.summary(benchmark.stats.stats.data, peer[1:])
    difference = comparison.difference(results["ours"], results["peer"])
    report(
        {"name": name} | figures | {"difference": difference, "work": comparison.work, "rounds": line.rounds,
         "package": speed.installed(line.package),
         "device": runs.hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))} | runs.stamp()
    )  # fmt: skip
    assert difference <= comparison.allowed
    if not torch.cuda.is_available():
        assert figures["ratio"] >= line.aim
