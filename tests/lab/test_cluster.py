"""Sweeps on Dask: inside the process, and on a cluster of two worker processes, which are killed and told lies."""

import io
import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from expected import refused
from kill_harness import PRETRAIN, TINY, left
from test_sweep import alive, command, planned, states, until, write_notebook  # noqa: F401 - planned is a fixture

from ptglab.errors import InputError
from ptglab.lab import cluster, spec
from ptglab.lab import sweeps as sweep

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes and ports are told from /proc")


@pytest.fixture(scope="module")
def two_workers():
    """A cluster of two worker processes, which its nannies start again; nobody else reaches it."""
    from distributed import LocalCluster

    with LocalCluster(2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0",
                      worker_dashboard_address="127.0.0.1:0", memory_limit=0) as found:  # fmt: skip
        yield found


@pytest.fixture
def dask(two_workers):
    """Its address, with both workers there."""
    two_workers.wait_for_workers(2)
    two_workers.scheduler.allowed_failures = 3
    return two_workers.scheduler_address


def kill(two_workers, where: str) -> None:
    """Kill a worker by where it said it was."""
    [pid] = [n.pid for n in two_workers.workers.values() if n.worker_address == where.split()[0]]
    os.kill(pid, signal.SIGKILL)


def seen(out: Path) -> str:
    return (out / "results.csv").read_text()


# ---- inside this process


def listening() -> list[str]:
    """Return the addresses on which this process listens, as /proc writes them."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(path))
        except OSError:
            continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]


@linux
def test_on_one_machine_nothing_is_open_to_others(planned, tmp_path):  # noqa: F811
    """No port that runs what is sent; what Dask cannot leave out is on the loopback and has no pages."""
    from urllib.error import HTTPError
    from urllib.request import urlopen

    before = listening()
    events = sweep.run(planned({"seed": 0}), tmp_path / "out")
    assert next(events).state == "started"
    new = [address for address in listening() if address not in before]
    assert {address.split(":")[0] for address in new} <= {"0100007F"} and len(new) <= 2
    for port in (int(address.split(":")[1], 16) for address in new):
        for page in ("", "info/main/workers.html", "json/identity.json", "metrics", "health"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(f"http://127.0.0.1:{port}/{page}", timeout=10)
    list(events)
    assert listening() == before


# ---- on a cluster


def test_a_cluster_leaves_what_one_machine_does(planned, tmp_path, dask):  # noqa: F811
    cells = planned({"kind": ["x", "y"], "before": "@good"}, {"kind": "z", "before": "@broken", "seed": 3},
                    good={"kind": "stage"}, broken={"kind": "bad"})  # fmt: skip
    here, there = (states(sweep.run(cells, tmp_path / name, address and 1 or 2, address))
                   for name, address in (("here", ""), ("there", dask)))  # fmt: skip
    assert here == there and sorted(here.values()) == ["blocked", "failed", "finished", "finished", "finished"]
    assert seen(tmp_path / "here") == seen(tmp_path / "there")
    said = (tmp_path / "there" / "log.txt").read_text()
    assert said.count("tcp://127.0.0.1:") == 4 and "ValueError: a cell made to fail" in said
    assert len(set(pd.Series(said.split()).loc[lambda word: word.str.startswith("tcp:")])) == 2  # both worked
    assert not list((tmp_path / "there").glob(".seen-*"))


@linux
@pytest.mark.parametrize("allowed", [3, 0], ids=["Dask tries again", "we do"])
def test_a_killed_workers_cell_is_begun_again_by_another(planned, tmp_path, two_workers, dask, allowed):  # noqa: F811
    two_workers.scheduler.allowed_failures = allowed
    cells, out, said = (
        planned({"seed": 1, "before": "@good"}, good={"kind": "stage", "wait": 3.0}),
        tmp_path / "out",
        [],
    )
    kernel = 0
    for event in sweep.run(cells, out, dask=dask):
        said.append(event)
        if [e.state for e in said] == ["started"]:
            until(lambda: (out / cells[0].name / "pid").exists() and (out / cells[0].name / "pid").read_text())
            kernel = int((out / cells[0].name / "pid").read_text())
            kill(two_workers, event.where)
    assert [e.state for e in said] == ["started", "lost", "started", "finished", "started", "finished"]
    assert said[0].where in said[1].error and said[2].where != said[0].where
    until(lambda: not alive(kernel), 15)
    assert f"lost {cells[0].name}" in (out / "log.txt").read_text()
    assert (out / cells[0].name / "log.txt").read_text().count("begun ") == 2
    list(sweep.run(cells, tmp_path / "undisturbed"))
    assert seen(out) == seen(tmp_path / "undisturbed")


@linux
def test_a_cell_that_ends_its_workers_fails_at_last(tmp_path, two_workers, dask, monkeypatch):
    body = """
import os, signal
worker = open(f"/proc/{os.getppid()}/stat").read().split()[3]
os.kill(int(worker), signal.SIGKILL if kind == "bad" else 0)
"""
    notebook = write_notebook(tmp_path / "small.ipynb", body)
    two_workers.scheduler.allowed_failures = 0
    monkeypatch.setattr(cluster, "LOSSES", 1)
    cells = spec.plan(spec.Spec(title="t", grids=[spec.Part(notebook=notebook, parameters={"kind": ["bad", "good"]})]))
    events = list(sweep.run(cells, tmp_path / "out", dask=dask))
    assert states(events) == {cells[0].name: "failed", cells[1].name: "finished"}
    assert next(e.error for e in events if e.state == "failed").startswith("2 workers were lost that ran it")


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_sweep_is_stopped_on_the_cluster_and_goes_on(tmp_path, dask, how):
    notebook = write_notebook(tmp_path / "small.ipynb")
    text = {"title": "t", "grids": [{"notebook": notebook, "parameters": {"wait": 60.0}}]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(text))
    [cell], out = spec.plan(spec.read(tmp_path / "s.yaml")), tmp_path / "out"
    process = command(str(tmp_path / "s.yaml"), "--out", str(out), "--dask", dask)
    until(lambda: (out / cell.name / "pid").exists() and (out / cell.name / "pid").read_text())
    kernel = int((out / cell.name / "pid").read_text())
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    assert "Traceback" not in said and process.returncode == {signal.SIGKILL: -9}.get(how, 130)
    until(lambda: not alive(kernel), 15)
    cell.parameters["wait"] = 0.0
    assert states(sweep.run([cell], out, dask=dask)) == {cell.name: "finished"}


def test_without_a_shared_file_system_folders_travel(planned, tmp_path, dask, monkeypatch):  # noqa: F811
    site = cluster._site
    monkeypatch.setattr(cluster, "_site", lambda *a: cluster.replace(site(*a), shared=False))
    cells = planned({"kind": ["x", "bad"], "before": "@good"}, good={"kind": "stage"})
    out = tmp_path / "out"
    events = list(sweep.run(cells, out, dask=dask))
    assert sorted(states(events).values()) == ["failed", "finished", "finished"]
    bad = next(e for e in events if e.state == "failed")
    assert "ValueError: a cell made to fail" in bad.error
    assert "begun" in (out / bad.cell.name / "log.txt").read_text()
    assert (out / bad.cell.name / "failed-notebook.ipynb").exists()
    for cell in (c for c in cells if c != bad.cell):
        folder, _ = (out / cell.name / "here").read_text().split()
        assert not Path(folder).is_relative_to(out) and not Path(folder).exists()
    good = next(c for c in cells if c.needs and c != bad.cell)
    (out / good.name / "notebook.ipynb").unlink()
    (out / good.name / "stale").touch()
    again = states(sweep.run([c for c in cells if c != bad.cell], out, dask=dask))  # its stage travels from here
    assert again == {cells[0].name: "skipped", good.name: "finished"} and not (out / good.name / "stale").exists()
    list(sweep.run(cells, tmp_path / "here"))
    assert seen(out) == seen(tmp_path / "here")
    assert not [path for path in out.rglob(".*") if path.name.endswith(".tmp") or ".seen" in path.name]


def test_a_worker_says_what_it_sees(tmp_path, dask):
    from distributed import Client

    with Client(dask, set_as_default=False) as client:
        for path, sees in ((tmp_path, True), (tmp_path / "no", False)):
            assert {there["sees"] for there in client.run(cluster.about, str(path)).values()} == {sees}


def test_workers_of_another_version_are_refused(planned, tmp_path, dask, monkeypatch, capsys):  # noqa: F811
    cells, out = planned({"seed": 0}), tmp_path / "out"
    monkeypatch.setattr(cluster.importlib.metadata, "version", lambda name: "1.2.3")
    list(sweep.run(cells[:1], out, dask=dask))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("worker ")]
    assert len(said) == 1 and "results may differ in the last digits" in said[0] and " torch " in said[0]
    (out / cells[0].name / "notebook.ipynb").unlink()
    monkeypatch.setattr(cluster, "__version__", "9.9.9")
    with pytest.raises(InputError, match=r"worker .* runs ptglab 0\..*this is 9\.9\.9.*install the same"):
        list(sweep.run(cells, out, dask=dask))


@pytest.mark.parametrize("address", ["nonsense", "foo://x:1", "tcp://127.0.0.1:port"])
def test_where_no_scheduler_can_be_the_address_is_named(planned, tmp_path, address):  # noqa: F811
    with pytest.raises(InputError, match=f"no Dask scheduler answers at {address}: .") as caught:
        list(sweep.run(planned({"seed": 0}), tmp_path / "out", dask=address))
    assert "\n" not in str(caught.value)


def test_a_scheduler_file_will_do_and_a_damaged_one_is_named(planned, tmp_path, two_workers, dask):  # noqa: F811
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"id": "x", "address": dask}))
    assert set(states(sweep.run(planned({"seed": 0}), tmp_path / "out", dask=str(file))).values()) == {"finished"}
    file.write_text("{}")
    with pytest.raises(InputError, match=f"no Dask scheduler answers at {file}: ."):
        list(sweep.run(planned({"seed": 1}), tmp_path / "out", dask=str(file)))


def test_a_scheduler_that_goes_ends_the_sweep_in_a_line(planned, tmp_path):  # noqa: F811
    from distributed import LocalCluster

    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", memory_limit=0,
                      worker_dashboard_address="127.0.0.1:0") as found:  # fmt: skip
        cells = planned({"wait": [0.0, 60.0]})
        events = sweep.run(cells, tmp_path / "out", dask=found.scheduler_address)
        assert [next(events).state for _ in range(2)] == ["started", "finished"]
        found.close()
        with pytest.raises(InputError, match="the Dask scheduler has gone, .*; run again, it goes on where it was"):
            list(events)
    assert states(sweep.run(cells[:1], tmp_path / "out")) == {cells[0].name: "skipped"}


def test_a_gpu_is_asked_for_where_workers_declare_some(planned, tmp_path):  # noqa: F811
    from distributed import LocalCluster

    cells, out = planned({"seed": [0, 1]}), tmp_path / "out"
    with LocalCluster(1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0", memory_limit=0,
                      worker_dashboard_address="127.0.0.1:0", resources={"GPU": 1}) as found:  # fmt: skip
        list(sweep.run(cells, out, dask=found.scheduler_address))
    began, ended = ([(out / cell.name / name).stat().st_mtime for cell in cells] for name in ("here", "value"))
    assert max(began) > min(ended)  # one after the other: two threads, one GPU

    class Client:
        def submit(self, *_, resources, **__):
            return resources

    def asked(gpu: bool, **values) -> dict | None:
        return cluster.submit(Client(), spec.Cell("c", "02_pretrain", values), cluster.Site(tmp_path, "t", gpu=gpu), {})

    assert asked(True) == asked(True, device="cuda") == {"GPU": 1}
    assert asked(False) is None and asked(True, device="cpu") is None


# ---- folders that travel


def test_a_folder_is_unpacked_as_it_was_packed(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(range(256)))
    (tmp_path / "a" / "notebook.ipynb").write_text("{}")
    (tmp_path / "a" / ".lock").touch()
    (tmp_path / "a" / "link").symlink_to("/etc/passwd")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    cluster.unpack(cluster.pack(tmp_path / "a"), tmp_path / "x")
    assert sorted(str(p.relative_to(tmp_path / "x")) for p in (tmp_path / "x").rglob("*")) == [
        "b", "b/c", "notebook.ipynb"]  # fmt: skip
    assert (tmp_path / "x" / "b" / "c").read_bytes() == bytes(range(256))


def zipped(files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..\\out", "C:\\out", "a/.."])
def test_no_path_leaves_the_folder(tmp_path, name):
    refused(name, "outside of it", call=cluster.unpack)(zipped({"fine": b"", name: b"x"}), tmp_path / "in" / "x")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_travels_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "MAX_ARCHIVE", 1000)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large").write_bytes(bytes(1001))
    refused("a holds 1,001 bytes", "1,000", call=cluster.pack)(tmp_path / "a")
    refused("larger than 1,000 bytes", call=cluster.unpack)(zipped({"zeros": bytes(1001)}), tmp_path / "x")
    monkeypatch.setattr(cluster, "MAX_FILES", 1)
    refused("larger than", call=cluster.unpack)(zipped({"a": b"", "b": b""}), tmp_path / "x")
    lies = zipped({"zeros": bytes(100_000)}).replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    refused("damaged", call=cluster.unpack)(lies, tmp_path / "x")
    refused("damaged", call=cluster.unpack)(zipped({"a": b"abc"})[:-10], tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / ".x.tmp").exists()


# ---- the real notebooks


@linux
@pytest.mark.slow
def test_two_jobs_and_two_workers_of_which_one_is_killed_leave_the_same(tmp_path, two_workers, dask):
    """Killed while it pre-trains: the other goes on from the checkpoint, and all is the same to the bit."""
    linear = {"init": "simclr", "mode": "linear", "epochs": 5, "pretrain_run": "@simclr", "detectors": "disagreement"}
    scratch = {"init": "scratch", "mode": "full", "epochs": 2, "epochs_fold": 1, "detectors": "disagreement"}
    cells = spec.plan(spec.Spec(
        title="t", parameters={"dataset": "digits", "device": "cpu", **TINY},
        stages={"simclr": spec.Stage(notebook="02_pretrain", parameters={"data_run": "", **PRETRAIN, "epochs": 60})},
        grids=[spec.Part(notebook="09_one_experiment", parameters=values) for values in (linear, scratch)],
    ))  # fmt: skip
    here, there = tmp_path / "here", tmp_path / "there"
    assert set(states(sweep.run(cells, here, jobs=2)).values()) == {"finished"}
    records, said, where = there / cells[0].name / "metrics.jsonl", [], ""
    for event in sweep.run(cells, there, dask=dask):
        said.append(event)
        if event.cell == cells[0] and event.state == "started" and not where:
            until(lambda: records.exists() and records.read_text().count("\n") > 10)
            where = event.where
            kill(two_workers, where)
    assert [e.state for e in said if e.cell == cells[0]] == ["started", "lost", "started", "finished"]
    assert f"with worker {where}; begun again by tcp://" in (there / "log.txt").read_text()
    epochs = [json.loads(line)["epoch"] for line in records.read_text().splitlines()]
    assert len(epochs) < 60 + 5 and sorted(set(epochs)) == list(range(1, 61))  # it went on, not all over again
    assert left(here) == left(there)


def test_jobs_and_dask_exclude_each_other(tmp_path):
    process = command("smoke", "--jobs", "2", "--dask", "tcp://127.0.0.1:1", cwd=tmp_path)
    assert "--jobs is of this machine" in process.communicate(timeout=60)[1] and process.returncode == 2


def test_without_dask_the_mend_is_named(planned, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "distributed", None)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"Dask is not installed.*pip install 'ptglab\[lab\]'"):
        list(sweep.run(planned({"seed": 0}), tmp_path / "out"))
    assert time.monotonic() - began < 5
