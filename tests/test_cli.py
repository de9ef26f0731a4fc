"""The command line, as a person meets it."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ptglab import cli, stopping
from ptglab.lab import board, runs, sweeps


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function from words to (exit status, stdout, stderr) of the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stopping, "catch", lambda: None)  # signals stay pytest's

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptglab", *words])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return command


@pytest.mark.parametrize("words", [[], ["demo"], ["audit"], ["run"], ["sweep"], ["doctor"]], ids=str)
def test_help_has_an_example_or_lists_commands(run, words):
    status, out, _ = run(*words, "--help")
    assert status == 0 and "Usage: ptglab" in out
    if words and words != ["doctor"]:
        assert re.search(f"Examples?: ptglab {words[0]}", out)


BYTES = "\udcff"  # a byte that is not UTF-8, as Python holds it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demoo"], "Did you mean 'demo'"),
        (["demo", "-p", "nois_rate=0.2"], "did you mean 'noise_rate'"),
        (["demo", "-p", "noise_rate"], "NAME=VALUE"),
        (["demo", "-p", "epochs=many"], "'epochs' is 'many'; it must be of type int"),
        (["audit", "digist"], "unknown dataset 'digist': did you mean 'digits'"),
        (["audit", "no/photos"], "no such file or folder: no/photos"),
        (["audit", "digits", "--budget", "quik"], "'quick'"),
        (["audit", "digits", "--flag", "some"], "'some'"),
        (["audit", f"digits{BYTES}/"], "'dataset'"),
        (["audit", "digits", "--labels", BYTES], "'labels'"),
        (["run", "02_pretran", "out.ipynb"], "did you mean '02_pretrain'"),
        (["run", "02_pretrain", "sub/out.ipynb", "-p", "epohcs=3"], "'epohcs': did you mean 'epochs'"),
        (["sweep", "smok"], "unknown sweep 'smok': did you mean 'smoke'"),
        (["sweep", "no/smoke.yaml"], "no/smoke.yaml"),
        (["sweep", "smoke", "-p", "widht=3"], "'widht': did you mean 'width'"),
        (["sweep", "smoke", "-p", "width"], "NAME=VALUE"),
        (["sweep", "smoke", "--dask", "tcp://here:1", "--jobs", "2"], "--jobs"),
    ],
)
def test_mistakes_are_one_line_exit_2_and_leave_nothing(run, words, said, tmp_path):
    status, out, error = run(*words)
    assert status == 2 and not out and said in error
    assert error.startswith("ptglab:") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_mistake_that_a_notebook_finds_is_one_line_too(tmp_path):
    """In a process of its own, with a kernel."""
    words = [Path(sys.executable).with_name("ptglab"), "demo", "-p", "methods=simclear"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'simclr'" in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("ptglab:")]) == 1


def test_what_is_printed_commands_no_terminal_and_is_no_markup(run):
    status, out, error = run("run", "no\x1b]0;x\x07[red]", "out.ipynb")
    assert status == 2 and not out and "\x1b" not in error and "[red]" in error
    assert cli.safe("\x1b[31m[red]") == "\\x1b[31m\\[red]"


def test_an_interruption_is_one_line_and_exit_130(run, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.notebooks, "execute", stopped)
    status, out, error = run("demo")
    assert status == 130 and not out and error.strip() == f"ptglab: {stopping.LINE}"


@pytest.mark.parametrize("words", [["--help"], ["doctor"]], ids=str)
def test_output_that_nobody_reads_is_no_error(words, tmp_path):
    """In a process of its own, whose standard output has no reader from the start: `ptglab ... | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [Path(sys.executable).with_name("ptglab"), *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_of_a_sweep_runs_nothing(run, tmp_path):
    status, out, _ = run("sweep", "smoke", "--dry-run", "--jobs", "2")
    assert status == 0 and "6 executions" in out and "2 cells" in out and re.search(r"estimate: \d+ s with 2", out)
    assert not list(tmp_path.iterdir())


def test_an_audit_that_is_refused_leaves_nothing_and_takes_nothing(run, tmp_path, monkeypatch):
    def refused(notebook, out, values):
        out.parent.mkdir(exist_ok=True)
        (out.parent / "params.json").write_text("{}")
        raise cli.InputError("photos holds no images")

    monkeypatch.setattr(cli.notebooks, "execute", refused)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").touch()
    assert run("audit", "photos", "--out", "out") == (2, "", "ptglab: photos holds no images\n")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.ipynb").write_text("an earlier report")
    assert run("audit", "photos", "--out", "out")[0] == 2
    assert (tmp_path / "out" / "report.ipynb").read_text() == "an earlier report"


@pytest.mark.parametrize("unknown", ["", "Nothing is known."])
def test_an_audit_says_what_it_found(run, tmp_path, monkeypatch, unknown):
    def audited(notebook, out, values):
        assert values["budget"] == "standard" and values["flip"] is False and "detector" not in values
        summary = {"flagged": 12, "images": 3400, "unknown": unknown, "rate": 0.05, "low": 0.01, "high": 0.2,
                   "first": [100, 0.9, 0.8, 0.95], "confusions": [["cat", "[red]dog", 7], ["dog", "cat", 5]],
                   "seconds": {"load": 2.6}, "notes": ["9 files seen = 9 used"], "start": "lite0", "better": "",
                   "next": {"review": "ptglab run 07"}}  # fmt: skip
        out.parent.mkdir(parents=True)
        (out.parent / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(cli.notebooks, "execute", audited)
    status, out, _ = run("audit", "digits", "--budget", "standard", "--no-flip")
    said = ["5.0% (1.0% to 20.0%)", "first 100 suspects, 90%", "80% to 95%"]
    for words in (
        "12 of 3,400 labels look wrong",
        "9 files seen",
        "[red]dog",
        "gallery.html",
        "load 3",
        "ptglab run 07",
    ):
        assert words in out.replace("\n", " ")
    assert all((words in out) != bool(unknown) for words in said) and unknown in out


def test_a_demo_a_run_and_a_sweep_say_where_results_are(run, tmp_path, monkeypatch):
    row = {"dataset": "digits", "noise": "uniform", "noise_rate": 0.4, "effective_rate": 0.4, "n_train": 9, "f1": 0.5,
           "recipe": "plain", "detector": "knn"}  # fmt: skip
    arms = {("scratch", "full"): 0.5, ("pixels", "linear"): 0.75, ("simclr", "linear"): 0.875}
    rows = [row | {"init": init, "mode": mode, "accuracy_last": last, "seed": s}
            for (init, mode), last in arms.items() for s in (0, 1)]  # fmt: skip
    monkeypatch.setattr(cli.notebooks, "execute", lambda *_: runs.start("runs/demo").save_results(rows))
    status, out, _ = run("demo")
    assert status == 0 and all(words in out for words in ("nominal 40%", "2 noise seeds", "simclr", "50.0 ± 0.0"))
    assert "25.0 ± 0.0 points (pixels less scratch), the features add 12.5 ± 0.0 (simclr less pixels); n = 2" in out
    assert run("run", "02_pretrain", "out.ipynb", "-p", "epochs=3") == (0, "out.ipynb\n", "")
    monkeypatch.setattr(sweeps, "run", lambda cells, out, jobs, dask: (len(cells), str(out), jobs, dask))
    monkeypatch.setattr(board, "watch", lambda title, news, *_: 3 if news == (6, "runs/smoke", 2, "") else 0)
    status, out, _ = run("sweep", "smoke", "--jobs", "2")
    assert status == 3 and "runs/smoke/results.csv" in out


def test_doctor_names_versions_device_and_data_root(run, monkeypatch, tmp_path):
    status, out, _ = run("doctor")
    assert (
        status == 0 and [w for w in ("torch", "papermill", "cpu", "00_quickstart", "data root") if w not in out] == []
    )
    monkeypatch.setenv("PTGLAB_DATA", str(tmp_path / "nowhere"))
    assert "missing: PTGLAB_DATA names" in run("doctor")[1]


def test_the_wheel_carries_the_notebooks_and_sweeps_and_nothing_they_left(tmp_path):
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    names = {name for name in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist() if "notebooks/" in name}
    ours = [path for kind in ("*.ipynb", "sweeps/*.yaml", "sweeps/*.csv") for path in (root / "notebooks").glob(kind)]
    drawn = {f"ptglab/notebooks/figures/{name}.csv" for name in ("speed", "scale", "ssl_quality")}  # by notebook 8
    assert names == drawn | {f"ptglab/{path.relative_to(root).as_posix()}" for path in ours}
    assert "ptglab/notebooks/sweeps/digits.yaml" in names
