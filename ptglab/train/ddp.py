"""One network trained by many processes, each on its shard of every batch, by torch's DistributedDataParallel.

A notebook calls `run`. On several hosts that share a file system, a script calls `joined` instead, and each host
starts it by `torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py`:

    images = data.load("cifar10").images
    network = backbones.build("resnet18", 64, images, seed=0)
    place = engine.prepare("cuda")
    print(*ddp.joined(pretrain.train, network, images, "simclr", epochs=200, place=place, checkpoint="c.safetensors"))
    if os.environ["RANK"] == "0":
        backbones.save("model.safetensors", network)

Every process computes the loss of the whole batch from the embeddings of all, and the gradient with respect to its own
rows; summed over the processes these are the gradients of one process with the whole batch.
"""

import copy
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from ptglab.errors import InputError
from ptglab.files import GO_ON, writing
from ptglab.train import checkpoints

CPU_MOST = 16  # processes on a CPU, where they are for trying out
GRACE = 5.0  # seconds that processes have to end by themselves after one was lost
PATIENCE = timedelta(minutes=10)  # for another process: rank 0 also takes the kNN accuracy and writes checkpoints


@dataclass(frozen=True)
class Shard:
    """Which part of every batch this process works on: that of `rank`, out of `world`. By default, all of it.

    synchronised: whether batch norm sees the whole batch (nn.SyncBatchNorm, on GPUs only) or this shard alone.
    """

    rank: int = 0
    world: int = 1
    synchronised: bool = False

    @property
    def least(self) -> int:
        """The fewest rows a batch may have: batch norm cannot train on a single one."""
        return 2 if self.synchronised else 2 * self.world

    def rows(self, total: int) -> slice:
        """Return the rows of a batch of `total` that belong to this shard; sizes differ by at most one."""
        size, larger = divmod(total, self.world)
        start = self.rank * size + min(self.rank, larger)
        return slice(start, start + size + (self.rank < larger))

    def all_gather(self, z: Tensor, total: int) -> Tensor:
        """Return the `total` rows of all shards, float32, in order; gradients flow into `z`, this shard's own rows."""
        if self.world == 1:
            return z
        z, own = z.float(), self.rows(total)
        whole = z.new_zeros(total, *z.shape[1:])
        whole[own] = z.detach()
        dist.all_reduce(whole)  # gloo gathers equal sizes only; every row is a sum with zeros
        whole[own] = z
        return whole

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return `network`, which keeps the weights, so that backward averages gradients over all shards.

        A loss is multiplied by `world` first.
        """
        if self.world == 1:
            return network
        if self.synchronised:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return DistributedDataParallel(network)


def count(devices: str, device: torch.device) -> int:
    """Return how many processes `devices` means, "all" or a number: one a GPU, or so many on a CPU, where all is 1.

    Raises InputError if there are not so many.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if devices != "all" and not (devices.isascii() and devices.isdigit() and int(devices[:9]) >= 1):
        raise InputError(f"devices is '{devices}'; it must be all, or a number from 1")
    number = gpus or 1 if devices == "all" else int(devices[:9])
    if number > (gpus or CPU_MOST):
        there = f"{gpus} GPUs here" if gpus else f"at most {CPU_MOST} processes on a CPU"
        raise InputError(f"devices is {number}, but there are {there}: give devices=all")
    if number > 1 and device.index:
        raise InputError(f"{number} devices begin with the first GPU: give device=cuda instead of {device}")
    return number


def run(devices: str, function: Callable[..., Iterator[dict]], *args, **kwargs) -> Iterator[dict]:
    """Return the records of `function(*args, **kwargs)`, a training loop, run by `devices` processes (see `count`).

    "1" simply calls it. Otherwise the processes import `function` by its name. Rank 0 waits until a record is taken,
    so that no checkpoint counts an epoch whose record was lost; `history` is filled, and at the end the modules among
    the arguments get the trained weights. kwargs must hold `place`. Raises what `function` raises, and InputError if a
    process is lost.
    """
    number = count(devices, kwargs["place"].device)
    return function(*args, **kwargs) if number == 1 else _spawned(number, function, args, kwargs)


def joined(function: Callable[..., Iterator[dict]], *args, **kwargs) -> Iterator[dict]:
    """Return the records of `function`, run by all the processes that torchrun has started; each calls this."""
    return _member(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")), function, args, kwargs)


def _member(rank: int, world: int, local: int, function: Callable, args: tuple, kwargs: dict, meeting: str = "env://"):
    """Join the processes that meet at a URL, and yield the records of `function`, run on this process's shard."""
    on_gpu = kwargs["place"].device.type == "cuda"
    place = replace(kwargs["place"], shard=Shard(rank, world, on_gpu))
    if on_gpu:
        place = replace(place, device=torch.device("cuda", local))
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", meeting, PATIENCE, world, rank)
    try:
        yield from function(*args, **kwargs | {"place": place})
    finally:
        dist.destroy_process_group()


def _spawned(number: int, function: Callable, args: tuple, kwargs: dict) -> Iterator[dict]:
    """Yield the records of `function`, run by `number` processes of this machine, and take over what they trained."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    with tempfile.TemporaryDirectory(prefix="ptglab-") as folder:
        with writing(folder):
            packed = _packed((args, kwargs), folder)
        context = multiprocessing.spawn(_work, (number, there, folder, torch.get_num_threads(), function, *packed),
                                        number, join=False)  # fmt: skip
        there.close()
        try:
            with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # all have ended: `join` says why
                yield from _received(here, context, kwargs.get("history"))
            here.close()
            while not context.join(None, GRACE):
                pass
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            name, _, message = last.partition(": ")
            for kind in (InputError, FloatingPointError):  # what a training loop says by itself
                if name.split(".")[-1] == kind.__name__:
                    raise kind(message) from None
            raise InputError(f"process {error.error_index} of {number} was lost ({last}); {GO_ON}") from None
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        trained, _ = checkpoints.read_tensors(Path(folder, "trained"))
        for i, module in enumerate(_modules(args, kwargs)):
            module.load_state_dict({name: trained[f"{i}/{name}"] for name in module.state_dict()})
            kwargs["place"].put(module)


def _received(pipe, context, history: np.ndarray | None) -> Iterator[dict]:
    """Yield the records of rank 0, and answer each once it is taken; raise what a process that failed has said."""
    while True:
        while pipe not in wait([pipe, *context.sentinels]):
            context.join(0, GRACE)
        record, margins = pipe.recv()
        if record is None:
            return
        if margins is not None:
            history[record["epoch"] - 1] = margins
        yield record
        if isinstance(history, np.memmap):
            history.flush()  # no later than the checkpoint that counts on it
        pipe.send("taken")


def _work(rank: int, number: int, pipe, folder: str, threads: int, function: Callable, args: tuple, kwargs: dict):
    """Be one of the processes of `_spawned`."""
    torch.set_num_threads(max(1, threads // number))
    torch.backends.cudnn.benchmark = True  # as `engine.prepare` does, which this process has not called
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ["GLOO_SOCKET_IFNAME"] = loopback  # nothing listens to the network
    history = kwargs.get("history")
    for record in _member(rank, number, rank, function, args, kwargs, f"file://{folder}/meeting"):
        if rank == 0:
            pipe.send((record, None if history is None else history[record["epoch"] - 1]))
            pipe.recv()
    if rank == 0:
        states = enumerate(module.state_dict() for module in _modules(args, kwargs))
        trained = {f"{i}/{name}": value for i, state in states for name, value in state.items()}
        checkpoints.write_tensors(Path(folder, "trained"), trained, {})
        pipe.send((None, None))


def _modules(args: tuple, kwargs: dict) -> list[nn.Module]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]


@dataclass
class _Call:
    """Becomes the result of a function call where it is unpickled."""

    function: Callable
    args: tuple

    def __reduce__(self):
        return self.function, self.args


def _packed(value: object, folder: str) -> object:
    """Return arguments as they are sent to the processes: every tensor as a file that all of them map."""
    if isinstance(value, tuple):
        return tuple(_packed(each, folder) for each in value)
    if isinstance(value, dict):
        return {name: _packed(each, folder) for name, each in value.items()}
    if isinstance(value, nn.Module):
        return _Call(_filled, (copy.deepcopy(value).to("meta"), _packed(dict(value.state_dict()), folder)))
    if isinstance(value, Tensor):
        with tempfile.NamedTemporaryFile(suffix=".npy", dir=folder, delete=False) as file:
            np.save(file, value.numpy(force=True))
        return _Call(_mapped, (file.name,))
    return value


def _mapped(path: str) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copied where it is written to


def _filled(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, assign=True)
    return module
