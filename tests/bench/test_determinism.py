"""The same seed gives the same bits in two processes, and a difference is seen and said."""

import subprocess
import sys

import determinism
import numpy as np
import pytest
from click.testing import CliRunner
from expected import refused

from ptglab import cli


def test_two_fresh_processes_compute_the_same_bits():
    """As a person asks for it: a line a stage, exit status 0."""
    code = "import sys; from ptglab.cli import main; sys.argv[0] = 'ptglab'; main()"
    words = ["doctor", "--determinism", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.rsplit("  ", 1) for line in done.stdout.splitlines()]
    assert [(stage.strip(), verdict.strip()) for stage, verdict in said] == [
        (stage, "identical") for stage in determinism.STAGES
    ]


def test_another_seed_computes_other_bits_in_every_stage():
    """Or the comparison would see nothing."""
    first, second = (determinism.hashes(seed, "cpu") for seed in (0, 1))
    assert tuple(first) == tuple(second) == determinism.STAGES
    assert not [stage for stage in first if first[stage] == second[stage]]


def test_a_difference_is_said_and_is_exit_status_1(monkeypatch):
    runs = iter([dict.fromkeys(determinism.STAGES, "a"), dict.fromkeys(determinism.STAGES, "a") | {"scores": "b"}])
    monkeypatch.setattr(determinism, "_in_a_process", lambda seed, device: next(runs))
    done = CliRunner().invoke(cli.cli, ["doctor", "--determinism"])
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert len(lines) == len(determinism.STAGES) and lines[-1].split() == ["scores", "not", "identical"]
    assert all(line.endswith("  identical") for line in lines[:-1])


def test_a_pipeline_that_fails_is_one_line():
    refused("did not run to its end", "device", call=determinism.compare)(0, "no such device")


@pytest.mark.parametrize("other", [np.zeros(4, np.float64), np.zeros((4, 1), np.float32), np.float32([0, 0, 0, 1e-45]),
                                   np.float32([0, 0, 0, -0.0]), np.zeros(3, np.float32)])  # fmt: skip
def test_the_smallest_difference_counts(other):
    assert determinism._hash([np.zeros(4, np.float32)]) != determinism._hash([other])
    assert determinism._hash([np.zeros(4, np.float32)]) == determinism._hash([np.zeros((4, 2), np.float32)[:, 0]])
