"""Where the cells of a sweep run: Dask, inside this process or on a cluster, and what its workers do with a cell.

On this machine Dask's scheduler and worker are threads of the sweep's own process, which talk through its memory: no
port is open that would run what others send, nothing can outlive the sweep. A cluster trusts its members: whoever
reaches its scheduler can run programs on all of its workers and on the machine of the sweep. Keep it on a network of
your own, or give it TLS (Dask's `distributed.comm`), which is then read from Dask's configuration.

A cluster of SLURM's, in a notebook or a script that stays for as long as the sweep; a worker a job, a cell a worker:

    from dask_jobqueue import SLURMCluster  # pip install dask-jobqueue
    slurm = SLURMCluster(cores=1, job_cpu=8, memory="32GB", walltime="08:00:00", job_extra_directives=["--gres=gpu:1"],
                         worker_extra_args=["--resources", "GPU=1"], job_script_prologue=["export OMP_NUM_THREADS=8"])
    slurm.adapt(maximum_jobs=16)
    print(slurm.scheduler_address)  # for: ptglab sweep cifar10n --dask ADDRESS

Any other one: `dask scheduler`, and on each machine `dask worker ADDRESS --nthreads 1 --resources GPU=1`.
"""

import importlib.metadata
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ptglab import __version__, data
from ptglab.errors import InputError
from ptglab.lab import notebooks, runs
from ptglab.lab.spec import Cell
from ptglab.train import engine

MAX_ARCHIVE, MAX_FILES = 1 << 30, 10_000  # bytes and files of a run folder that travels
LOSSES = 3  # lost workers after which a cell is not begun again: it may be what ends them
FAILURE = ("log.txt", "failed-notebook.ipynb")  # what comes back from a cell that failed
VERSIONS = ("torch", "torchvision", "numpy", "scikit-learn")  # on which results depend to the last bit
# A cell dies with its worker, which may be killed: otherwise it would go on beside the same cell on another worker.
BOOT = """
import ctypes, json, os, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: None)(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]): sys.exit(1)
from pathlib import Path
from ptglab import stopping
from ptglab.errors import InputError
from ptglab.lab.notebooks import execute
stopping.catch()
try:
    execute(sys.argv[2], Path("notebook.ipynb"), json.loads(sys.argv[3]))
except InputError as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    print(stopping.LINE, file=sys.stderr)
    sys.exit(stopping.STATUS)
"""


@dataclass(frozen=True)
class Site:
    """What every cell of a sweep is told: its folder, whether workers see it, the client's data root and version."""

    out: Path
    token: str  # of this sweep: in its keys, the name of its events, and of the file by which `out` is known
    shared: bool = True
    gpu: bool = False
    root: str = ""
    version: str = ""


@dataclass(frozen=True)
class Result:
    """A finished cell: how long it took, and its packed folder if that has to travel."""

    seconds: float = 0.0
    archive: bytes | None = None


class Failed(Exception):
    """A cell failed; those that need it fail with the same error, by Dask."""

    def __init__(self, cell: str, reason: str, archive: bytes | None = None):
        super().__init__(cell, reason, archive)
        self.cell, self.reason, self.archive = cell, reason, archive


@contextmanager
def connect(address: str, jobs: int, out: Path) -> Iterator[tuple]:
    """Yield (client, Site) of the Dask scheduler at `address`, also a scheduler file, or, if empty, of one inside this
    process with `jobs` threads. At the end, what still runs for the sweep is stopped.

    Raises InputError if there is no scheduler, or if its workers run another ptglab.
    """
    try:
        import dask
        import distributed
    except ModuleNotFoundError:
        raise InputError("Dask is not installed, which runs sweeps: pip install 'ptglab[lab]'") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what concerns a person is told by the sweep
    token, inside = uuid.uuid4().hex, None
    try:
        if address:
            file = {"scheduler_file": address} if os.path.isfile(address) else {"address": address}
            client = distributed.Client(**file, timeout="10s", set_as_default=False)
        else:
            # Its two web servers cannot be left out: they are on the loopback, and know no pages.
            quiet = {f"distributed.{who}.http.routes": [] for who in ("scheduler", "worker")}
            with warnings.catch_warnings(action="ignore"), dask.config.set(quiet):  # no network, say, or a port in use
                inside = distributed.LocalCluster(
                    n_workers=1, threads_per_worker=jobs, processes=False, memory_limit=0,
                    scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                    worker_dashboard_address="127.0.0.1:0",
                )  # fmt: skip
                client = distributed.Client(inside, set_as_default=False)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:  # Dask's, of what it was given
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"no Dask scheduler answers at {address or 'this process'}: {said}") from None
    try:
        root = ""
        with suppress(InputError, OSError):
            root = str(data.root().resolve(strict=True))
        yield client, _site(client, address, Site(out, token, root=root))
    finally:
        (out / f".seen-{token}").unlink(missing_ok=True)
        with suppress(Exception):  # the scheduler may be gone
            client.close()
        if inside:
            inside.close()


def _site(client, address: str, site: Site) -> Site:
    """Return `site` as the workers at `address` see it. Raises InputError unless they run the same ptglab as we."""
    if not address:
        return site
    mark, here = _mark(site), about("")
    if not client.scheduler_info()["workers"]:
        print(f"no worker at {address} yet: waiting for one", file=sys.stderr)
    for left in site.out.glob(".seen-*"):  # by a sweep that was killed
        left.unlink()
    mark.touch()
    try:
        client.submit(about, str(mark), pure=False).result()  # waits for a worker; some clusters start one for a task
        found = client.run(about, str(mark)).values()
    except Exception as error:
        raise InputError(f"the workers at {address} cannot run ptglab {here['ptglab']}, install the same there: "
                         f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None  # fmt: skip
    for there in found:
        if there["ptglab"] != here["ptglab"]:
            raise InputError(f"worker {there['host']} runs ptglab {there['ptglab']}, this is {here['ptglab']}: "
                             "install the same there")  # fmt: skip
    for there in found:
        if other := [f"{name} {there[name]}" for name in VERSIONS if there[name] != here[name]]:
            print(f"worker {there['host']} runs {', '.join(other)}: results may differ in the last digits",
                  file=sys.stderr)  # fmt: skip
            break
    shared, gpu = all(there["sees"] for there in found), any("GPU" in there["resources"] for there in found)
    return replace(site, shared=shared, gpu=gpu, version=here["ptglab"])


def about(mark: str, dask_worker=None) -> dict:
    """Return what decides whether this process, a worker, can run cells: versions, resources, whether it sees `mark`.

    Dask gives the worker, if it is called by `Client.run`.
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return versions | {
        "ptglab": f"{__version__} {runs.commit()}".strip(),
        "host": socket.gethostname(),
        "sees": bool(mark) and os.path.exists(mark),
        "resources": list(dask_worker.state.total_resources) if dask_worker else [],
    }


def submit(client, cell: Cell, site: Site, stages: dict):
    """Have a cell executed, after those of `stages` (Dask's futures by name) that it needs; return its future."""
    if not site.shared:  # those of an earlier sweep travel from here
        for name in (name for name in cell.needs if name not in stages):
            given = Result(archive=pack(site.out / name))
            with warnings.catch_warnings(action="ignore"):  # Dask's, of its size
                stages[name] = client.submit(_given, given, key=f"{name} as it was {site.token}", pure=False)
    needed = [stages[name] for name in cell.needs if name in stages]
    notebook = notebooks.notebook_path(cell.notebook).resolve()
    source = notebook.read_text(encoding="utf-8") if Path(cell.notebook).suffix == ".ipynb" else ""
    resources = {"GPU": 1} if site.gpu and cell.parameters.get("device") != "cpu" else None
    return client.submit(
        execute, cell, site, source, needed, key=f"{cell.name} {site.token}", pure=False, resources=resources
    )


def _given(result: Result) -> Result:
    return result


def execute(cell: Cell, site: Site, source: str, stages: list[Result]) -> Result:
    """Execute a cell on the worker that this is; `source` is its notebook, if that is none of ours.

    Where the sweep's folder is not seen, it stands in a temporary one, into which `stages` are unpacked. Raises Failed.
    """
    from distributed import get_worker

    worker = get_worker()
    where = f"{worker.address} on {socket.gethostname()}"
    worker.log_event(site.token, {"cell": cell.name, "where": where})
    if site.version and (here := about("")["ptglab"]) != site.version:
        raise Failed(cell.name, f"worker {where} runs ptglab {here}, the sweep {site.version}: install the same there")
    if site.shared and site.version and not _mark(site).exists():
        raise Failed(cell.name, f"worker {where} does not see {site.out}, as those before do: give it that file system")
    if site.shared:
        return Result(_run(cell, site, source, site.out, worker))
    with tempfile.TemporaryDirectory(prefix="ptglab-", dir=worker.local_directory) as temporary:
        out = Path(temporary)
        try:
            for name, stage in zip(cell.needs, stages, strict=True):
                unpack(stage.archive, out / name)
            seconds = _run(cell, site, source, out, worker)
            return Result(seconds, pack(out / cell.name))
        except Failed as failure:
            raise Failed(cell.name, failure.reason, pack(out / cell.name, FAILURE)) from None
        except InputError as error:
            raise Failed(cell.name, str(error), pack(out / cell.name, FAILURE)) from None


def _run(cell: Cell, site: Site, source: str, out: Path, worker) -> float:
    """Execute a cell in its folder below `out` and return the seconds. Raises Failed with the last line of its error.

    It runs in a process of its own, with its share of the worker's threads, which is stopped when nobody waits any
    more: the sweep was stopped or killed, or Dask gave the cell to another worker.
    """
    folder, began, key = out / cell.name, time.perf_counter(), worker.get_current_task()
    if cell.finished(out):  # its result was lost with a worker
        return 0.0
    folder.mkdir(parents=True, exist_ok=True)
    notebook = folder / f".{Path(cell.notebook).name}" if source else notebooks.notebook_path(cell.notebook).resolve()
    if source:
        notebook.write_text(source, encoding="utf-8")
    values = {n: str(out / v) if v in cell.needs else v for n, v in cell.parameters.items()} | {"run_dir": str(folder)}
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, engine.threads() // worker.state.nthreads))}
    if site.root and "PTGLAB_DATA" not in os.environ:
        environment["PTGLAB_DATA"] = site.root
    command = [sys.executable, "-c", BOOT, str(os.getpid()), str(notebook), json.dumps(values)]
    with open(folder / "log.txt", "a") as log:
        print(f"begun {time.strftime('%Y-%m-%d %H:%M:%S')} by worker {worker.address} on {socket.gethostname()}",
              file=log, flush=True)  # fmt: skip
        start = log.tell()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        stopped = False
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            task = worker.state.tasks.get(key)
            if not stopped and (task is None or task.state != "executing"):
                process.terminate()
                stopped = True
    if process.returncode == 0:
        (folder / "failed-notebook.ipynb").unlink(missing_ok=True)
        return time.perf_counter() - began
    with open(folder / "log.txt", "rb") as log:
        log.seek(start)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    raise Failed(cell.name, lines[-1] if lines else f"ended with status {process.returncode}")


def pack(folder: Path, names: tuple[str, ...] = ()) -> bytes:
    """Return a folder, or the files `names` of it, as a zip file. Raises InputError if it is larger than may travel."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    paths = [path for path in paths if path.name != ".lock" and (not names or path.name in names)]
    size, packed = sum(path.stat().st_size for path in paths), io.BytesIO()
    if size > MAX_ARCHIVE or len(paths) > MAX_FILES:
        raise InputError(f"{folder.name} holds {size:,} bytes in {len(paths):,} files, of which {MAX_ARCHIVE:,} in "
                         f"{MAX_FILES:,} travel at most: give the workers a file system that holds it")  # fmt: skip
    with zipfile.ZipFile(packed, "w") as archive:
        for path in paths:
            archive.write(path, path.relative_to(folder).as_posix())
    return packed.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Put a packed folder in the place of `folder`; the files of a cell that failed, beside what is there.

    Nothing is written anywhere else: raises InputError for names that lead out of it, and for more than may travel.
    """
    shutil.rmtree(temporary := folder.with_name(f".{folder.name}.tmp"), ignore_errors=True)
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            files = archive.infolist()
            if len(files) > MAX_FILES or sum(file.file_size for file in files) > MAX_ARCHIVE:
                raise InputError(f"what came back for {folder} is larger than {MAX_ARCHIVE:,} bytes: left out")
            for file in files:
                name = PurePosixPath(file.filename.replace("\\", "/"))
                if name.is_absolute() or ".." in name.parts or ":" in file.filename:
                    raise InputError(f"what came back for {folder} holds '{file.filename}', outside of it: left out")
            archive.extractall(temporary)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"what came back for {folder} is damaged: {error}") from None
    if (temporary / "notebook.ipynb").exists():
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in temporary.iterdir():
        path.replace(folder / path.name)
    temporary.rmdir()


def _mark(site: Site) -> Path:
    return site.out / f".seen-{site.token}"
