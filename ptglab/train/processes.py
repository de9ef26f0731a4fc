"""Many processes that train one network: started on this machine, or by torchrun on several, and told what to do.

    ptglab run 02_pretrain out.ipynb -p devices=all      # every GPU of this machine, as in a notebook

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python \
        ptglab run 02_pretrain out.ipynb -p devices=all  # the same line on each of two hosts

Whoever calls `run`, say a notebook, is process 0: it trains, records and writes. The others get the images and the
network from it, take their share of every batch, and write nothing, so that hosts need share no file system.
"""

import copy
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ptglab.errors import InputError
from ptglab.files import GO_ON
from ptglab.train import collectives, engine

CPU_MOST = 16  # processes on a CPU, where they are for trying out
GRACE = 10.0  # seconds for a process to end by itself
START = timedelta(minutes=30)  # for processes to come together, and to be sent the images
LOST = f"another process of this run is gone; {GO_ON}"
GONE = "ptglab: the process that began this run is gone: this one of its processes stops, too"
BOOT = "import sys; from ptglab import processes; processes.help_here(sys.argv[1], *map(int, sys.argv[2:]))"
TOLD_ONLY_THERE = ("history",)  # what process 0 alone fills


class Lost(InputError):
    """Another of the processes has ended."""


def count(devices: str, device: torch.device) -> int:
    """Return how many processes `devices` means, "all" or a number: one a GPU, or so many on a CPU, where all is 1.

    Under torchrun all are those that it started. Raises InputError if there are not so many.
    """
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if _torchrun():
        there = int(os.environ["WORLD_SIZE"])
    if devices != "all" and not (devices.isascii() and devices.isdigit() and int(devices[:9]) >= 1):
        raise InputError(f"devices is '{devices}'; it must be all, or a number from 1")
    number = there if devices == "all" else int(devices[:9])
    if number > 1 and _torchrun() and number != there:
        raise InputError(f"devices is {number}, but torchrun has started {there} processes: give devices=all")
    if number > (CPU_MOST if device.type == "cpu" and not _torchrun() else there):
        here = f"{there} GPUs here" if device.type == "cuda" else f"at most {CPU_MOST} processes on a CPU"
        raise InputError(f"devices is {number}, but there are {here}: give devices=all")
    if number > 1 and device.index:
        raise InputError(f"{number} devices begin with the first GPU: give device=cuda in the place of {device}")
    return number


def run(devices: str, function: Callable[..., Iterator[dict]], *args, **kwargs) -> Iterator[dict]:
    """Return the records of `function(*args, **kwargs)`, a training loop that many processes run as one.

    It trains what it is given in place, here, as it does alone, to the same result up to rounding; with `devices` "1"
    it is called, and nothing else. See `count` for `devices`. The others import `function` by its name, so that it must
    be one of a module. Raises InputError, with the records, when a process is lost.
    """
    kwargs.setdefault("place", engine.place())
    number = count(devices, kwargs["place"].device)
    return function(*args, **kwargs) if number == 1 else _first(number, (function, args, kwargs))


def _first(number: int, job: tuple) -> Iterator[dict]:
    """Be process 0 of `number` that do a job."""
    if _torchrun():
        store = _agreed()
        try:
            yield from _part(dist.PrefixStore(f"job{store.add('jobs', 1)}", store), 0, number, job)
        except Lost as error:
            raise InputError(str(error)) from None
        return
    with _helpers(number, max(1, torch.get_num_threads() // number)) as store:
        yield from _part(store, 0, number, job)


def _part(store: dist.Store, rank: int, number: int, job: tuple | None = None) -> Iterator[dict]:
    """Take part in a job, which process 0 has and hands to the others; yield its records."""
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=START)
        sent = [_sent(*job) if job else None]
        dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
        function, args, kwargs = job or sent[0]
        if rank:
            kwargs["place"] = _beside(kwargs["place"])
        with collectives.together(kwargs["place"].device):
            yield from function(*args, **kwargs)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise Lost(LOST) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _sent(function: Callable, args: tuple, kwargs: dict) -> tuple:
    """Return a job as it is handed on: from a GPU to memory, without what process 0 alone fills."""

    def moved(value: object) -> object:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).cpu()
        return value.cpu() if isinstance(value, Tensor) else value

    kept = {name: None if name in TOLD_ONLY_THERE else moved(value) for name, value in kwargs.items()}
    return function, tuple(map(moved, args)), kept


def _beside(place: engine.Place) -> engine.Place:
    """Return the place of another process: the GPU that is its own."""
    if place.device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return engine.place(f"cuda:{os.environ['LOCAL_RANK']}", place.precision, place.compile_from)
    return engine.place("cpu", place.precision, place.compile_from)


@contextmanager
def _helpers(number: int, threads: int) -> Iterator[dist.Store]:
    """Start the other processes of `number`, and yield the store that brings all together.

    Afterwards they have ended. Raises InputError, with the last line of what it said, if one of them was lost.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    before, over = (os.environ.get("GLOO_SOCKET_IFNAME"), torch.get_num_threads()), threading.Event()
    with tempfile.TemporaryDirectory(prefix="ptglab-") as folder:
        store, helpers = dist.FileStore(f"{folder}/store", number), []
        os.environ["GLOO_SOCKET_IFNAME"] = loopback  # nothing listens to the network
        torch.set_num_threads(threads)
        try:
            for rank in range(1, number):
                own = {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
                own["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
                with open(f"{folder}/{rank}.log", "wb") as log:
                    helpers.append(subprocess.Popen(
                        [sys.executable, "-c", BOOT, folder, str(rank), str(number)], env=os.environ | own,
                        stdin=subprocess.PIPE, stdout=2, stderr=log,
                    ))  # fmt: skip
            while not store.check([f"here{rank}" for rank in range(1, number)]):
                if _dead(helpers):
                    raise Lost(LOST)
                time.sleep(0.02)
            threading.Thread(target=_watch, args=(helpers, over), daemon=True).start()
            yield store
            for helper in helpers:
                with suppress(subprocess.TimeoutExpired):
                    helper.wait(GRACE)
        except Lost:
            raise InputError(_why(helpers, Path(folder))) from None
        finally:
            over.set()
            for helper in helpers:
                helper.kill()
                helper.wait()
                helper.stdin.close()
            torch.set_num_threads(before[1])
            del os.environ["GLOO_SOCKET_IFNAME"]
            if before[0] is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = before[0]


def _dead(helpers: list[subprocess.Popen]) -> list[int]:
    """Return the ranks of those that have ended, and not because they were ready."""
    return [rank for rank, helper in enumerate(helpers, 1) if helper.poll() not in (None, 0)]


def _why(helpers: list[subprocess.Popen], folder: Path) -> str:
    """Return the line that tells which process was lost, waiting a little for it to end."""
    end = time.monotonic() + GRACE
    while not _dead(helpers) and time.monotonic() < end:
        time.sleep(0.05)
    if not (dead := _dead(helpers)):
        return LOST
    killed = [rank for rank in dead if helpers[rank - 1].returncode < 0]
    rank = (killed or dead)[0]  # others may have ended because of it
    said = [line for line in (folder / f"{rank}.log").read_text(errors="replace").splitlines() if line.strip()]
    status = helpers[rank - 1].returncode
    last = said[-1].removeprefix(f"[rank{rank}]: ") if said else f"status {status}"
    why = f"was killed by signal {-status}" if status < 0 else f"ended: {last}"
    return f"process {rank} of this run (0 to {len(helpers)}) {why}; {GO_ON}"


def _watch(helpers: list[subprocess.Popen], over: threading.Event) -> None:
    """End this process if another is lost and it waits for it for ever, as on a GPU it may."""
    while not over.wait(0.2):
        if dead := _dead(helpers):
            if not over.wait(2 * GRACE):
                print(f"ptglab: process {dead[0]} of this run is gone; {GO_ON}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def help_here(folder: str, rank: int, number: int) -> None:
    """Be one of the other processes of a machine: take part in one job, and end with the process that began it."""

    def follow() -> None:
        os.read(0, 1)  # there is nothing to read, until that process ends
        with suppress(OSError):
            os.write(1, f"{GONE}\n".encode())  # whole, as others do
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    store = dist.FileStore(f"{folder}/store", number)
    store.set(f"here{rank}", "")
    try:
        for _ in _part(store, rank, number):
            pass
    except InputError as error:
        time.sleep(1)  # if it is that process that was lost, the other thread says so
        sys.exit(str(error))


def _torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _agreed() -> dist.Store:
    """Return the store that torchrun keeps for its processes."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=START)


@contextmanager
def begun_by_torchrun() -> Iterator[bool]:
    """Yield whether this process does what it was called for: always, but for processes of torchrun other than 0.

    These take part in its jobs until it ends.
    """
    if not _torchrun():
        yield True
        return
    rank, number, store, done = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _agreed(), 0
    if rank == 0:
        try:
            yield True
        finally:
            store.set("end", "")
        return
    while not store.check(["end"]):
        if store.add("jobs", 0) > done:
            done += 1
            for _ in _part(dist.PrefixStore(f"job{done}", store), rank, number):
                pass
        time.sleep(0.1)
    yield False
