"""The command line, as a person meets it."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ptglab import cli


def run(*words: str, **options) -> subprocess.CompletedProcess:
    code = "import sys; from ptglab.cli import main; sys.argv[0] = 'ptglab'; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["demo", "--help"], ["audit", "--help"], ["run", "--help"], ["sweep", "--help"], ["doctor", "-h"]],
)
def test_help_has_an_example_or_lists_commands(words):
    done = run(*words)
    assert done.returncode == 0
    assert "Usage: ptglab" in done.stdout
    if words[0] in ("demo", "audit", "run", "sweep"):
        assert re.search(f"Examples?: ptglab {words[0]}", done.stdout)


@pytest.mark.parametrize(
    "words, said",
    [
        (["demoo"], "did you mean 'demo'"),
        (["demo", "-p", "nois_rate=0.2"], "did you mean 'noise_rate'"),
        (["demo", "-p", "noise_rate"], "NAME=VALUE"),
        (["demo", "-p", "epochs=many"], "'epochs' is 'many'; it must be of type int"),
        (["audit", "digist"], "unknown dataset 'digist': did you mean 'digits'"),
        (["audit", "photos"], "unknown dataset 'photos'"),
        (["audit", "no/photos"], "no such file or folder: no/photos"),
        (["audit", "digits", "--budget", "quik"], "quik"),
        (["audit", b"digits\xff/"], "no such file or folder"),
        (["audit", "digits", "--labels", b"\xff"], "parameter 'labels' is no text"),
        (["run", "02_pretran", "out.ipynb"], "did you mean '02_pretrain'"),
        (["run", "02_pretrain", "out.ipynb", "-p", "epohcs=3"], "'epohcs': did you mean 'epochs'"),
        (["sweep", "smok"], "unknown sweep 'smok': did you mean 'smoke'"),
        (["sweep", "no/smoke.yaml"], "no such sweep: no/smoke.yaml"),
        (["sweep", "smoke", "-p", "widht=3"], "'widht': did you mean 'width'"),
        (["sweep", "smoke", "-p", "width"], "NAME=VALUE"),
        (["sweep", "smoke", "-p", "labels=label_worse"], "unknown label column of digits 'label_worse'"),
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


def test_a_dry_run_of_a_sweep_runs_nothing(tmp_path):
    done = run("sweep", "smoke", "--dry-run", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0 and "5 executions" in done.stdout and "2 cells" in done.stdout
    assert re.search(r"estimate: \d+ s with 2 at a time", done.stdout)
    assert not list(tmp_path.iterdir())


def test_an_audit_that_is_refused_leaves_nothing_and_takes_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    done = run("audit", "photos", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "photos holds no images" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.ipynb").write_text("an earlier report")
    assert run("audit", "digits", "--out", "out", "--flag", "some", cwd=tmp_path).returncode == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.ipynb"]
    assert (tmp_path / "out" / "report.ipynb").read_text() == "an earlier report"


def test_an_audit_says_what_it_found(tmp_path, capsys):
    told = {"flagged": 12, "images": 3400, "detector": "ensemble", "rate": 0.05, "low": 0.01, "high": 0.2,
            "unreadable": 3, "confusions": [["cat", "[red]dog", 7], ["dog", "cat", 5]]}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(told))
    cli._print_audit(tmp_path)
    said = capsys.readouterr().out
    for words in ("12 of 3,400 labels look wrong", "5.0%", "1.0% to 20.0%", "3 left out", "[red]dog", "gallery.html"):
        assert words in said.replace("\n", " ")


def test_doctor_names_versions_device_and_data_root(tmp_path):
    done = run("doctor", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("torch", "papermill", "umap-learn", "cpu", "00_quickstart", "data root"):
        assert word in done.stdout


def test_doctor_names_a_missing_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("PTGLAB_DATA", str(tmp_path / "nowhere"))
    done = run("doctor")
    assert "missing: PTGLAB_DATA names" in done.stdout.replace("\n", " ")


def test_the_wheel_carries_the_notebooks_and_sweeps_and_nothing_they_left(tmp_path):
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = {name for name in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist() if "notebooks/" in name}
    ours = [path for kind in ("*.ipynb", "sweeps/*.yaml", "sweeps/*.csv") for path in (root / "notebooks").glob(kind)]
    assert names == {f"ptglab/{path.relative_to(root).as_posix()}" for path in ours}
    assert "ptglab/notebooks/sweeps/digits.yaml" in names
