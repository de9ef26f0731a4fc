"""The command line, as a person meets it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ptglab import cli


def run(*words: str, **options) -> subprocess.CompletedProcess:
    code = "import sys; from ptglab.cli import main; sys.argv[0] = 'ptglab'; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["run", "--help"], ["doctor", "-h"]])
def test_help_has_an_example_or_lists_commands(words):
    done = run(*words)
    assert done.returncode == 0
    assert "Usage: ptglab" in done.stdout
    if words[0] in ("demo", "run"):
        assert f"Example: ptglab {words[0]}" in done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["demoo"], "did you mean 'demo'"),
        (["demo", "-p", "nois_rate=0.2"], "did you mean 'noise_rate'"),
        (["demo", "-p", "noise_rate"], "NAME=VALUE"),
        (["demo", "-p", "epochs=many"], "'epochs' is 'many'; it must be of type int"),
        (["run", "02_pretran", "out.ipynb"], "did you mean '02_pretrain'"),
        (["run", "02_pretrain", "out.ipynb", "-p", "epohcs=3"], "'epohcs': did you mean 'epochs'"),
        (["demo", "-p", "dataset=digist"], "unknown dataset 'digist': did you mean 'digits'"),
        (["demo", "-p", "noise_kind=unifrom"], "did you mean 'uniform'"),
        (["demo", "-p", "methods=simclear"], "did you mean 'simclr'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(words, said, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("ptglab:")]) == 1


def test_names_are_checked_before_anything_is_made(tmp_path):
    assert run("demo", "-p", "epohcs=3", cwd=tmp_path).returncode == 2
    assert run("run", "02_pretrain", "sub/out.ipynb", "-p", "epohcs=3", cwd=tmp_path).returncode == 2
    assert not list(tmp_path.iterdir())


def test_doctor_names_versions_device_and_data_root(tmp_path):
    done = run("doctor", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("torch", "papermill", "umap-learn", "cpu", "00_quickstart", "data root"):
        assert word in done.stdout


def test_doctor_names_a_missing_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("PTGLAB_DATA", str(tmp_path / "nowhere"))
    done = run("doctor")
    assert "missing: PTGLAB_DATA names" in done.stdout.replace("\n", " ")


def test_values_take_the_type_of_the_parameter():
    values = cli._values("02_pretrain", ["epochs=3", "learning_rate=1", "method=vicreg"])
    assert values == {"epochs": 3, "learning_rate": 1.0, "method": "vicreg"}
    assert isinstance(values["learning_rate"], float)


def test_the_wheel_carries_the_notebooks_and_nothing_they_left(tmp_path):
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = {name for name in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist() if "notebooks/" in name}
    assert names == {f"ptglab/notebooks/{path.name}" for path in (root / "notebooks").glob("*.ipynb")}
