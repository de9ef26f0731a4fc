"""Where training runs and in which order: device, precision, compilation, seeded draws, batches, folds."""

import ctypes
import math
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from ptglab.errors import InputError, one_of
from ptglab.train.ddp import Shard

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
RESIDENT_SHARE = 0.5  # of a GPU's free memory that images may take; the rest is for the network
COMPILE_FROM = 2000  # steps that pay back what compiling costs: half a minute on two CPU cores
COMPILERS = {"cpu": ("CXX", "g++"), "cuda": ("CC", "gcc")}  # what torch.compile calls: variable, default
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Place:
    """A device, how to compute there, and which shard of a batch. Convolutions run channels-last, which is faster."""

    device: torch.device
    precision: str
    compile_from: float = math.inf  # how many steps a function must be called for to be compiled
    shard: Shard = Shard()

    def put(self, module: nn.Module) -> nn.Module:
        """Move `module` to the device, its filters channels-last, and return it."""
        return module.to(self.device, memory_format=torch.channels_last)

    def batch(self, x: Tensor) -> Tensor:
        """Return a batch on the device; images [B, C, H, W] become channels-last."""
        x = x.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def resident(self, inputs: Tensor) -> Tensor:
        """Return `inputs` on the device if they fit there beside a network, and otherwise as they are."""
        moves = self.device.type == "cuda" and not inputs.is_cuda
        fits = not moves or inputs.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(self.device)[0]
        return inputs.to(self.device) if fits else inputs

    def compiled(self, function: Callable, steps: int) -> Callable:
        """Return `function`, compiled if `steps` calls pay for that; not a network whose batch norms talk to others."""
        alone = function is not forward or self.shard.world == 1
        return _compiled(function) if alone and steps and steps >= self.compile_from else function

    def autocast(self) -> AbstractContextManager:
        """Return the context the network's forward runs in; losses stay outside, in float32."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()


def place(device: str = "auto", precision: str = "auto", compile_from: float | None = None) -> Place:
    """Choose where to run: `auto` is CUDA with bfloat16 where there is a GPU, otherwise the CPU with float32.

    `compile_from` is the number of training steps from which network and augmentation are compiled; by default
    COMPILE_FROM where there is a compiler, and never elsewhere. Nothing is set: see `prepare`.
    Raises InputError for a device that is not there or an unknown precision.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("cpu|cuda(:([0-9]|[1-9][0-9]))?", device):
        raise InputError(f"unknown device '{device}': use auto, cpu, cuda or cuda:N")
    chosen = torch.device(device)
    on_gpu = chosen.type == "cuda"
    if on_gpu and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device '{device}' is not here ({torch.cuda.device_count()} CUDA devices): use device=cpu")
    if precision == "auto":
        precision = "bfloat16" if on_gpu else "float32"
    if compile_from is None:
        compile_from = COMPILE_FROM if _can_compile(chosen.type) else math.inf
    return Place(chosen, one_of("precision", precision, PRECISIONS), compile_from)


def prepare(device: str = "auto", precision: str = "auto", compile_from: float | None = None) -> Place:
    """Return `place(...)`, and set up this process for it: once, at the top of a notebook or a program.

    Sets the number of CPU threads to `threads()`; lets cuDNN search for the fastest convolutions, once, since batches
    keep their shape; and makes glibc keep freed memory for the next array, which it would fetch anew, page by page.
    """
    chosen = place(device, precision, compile_from)
    torch.set_num_threads(threads())
    torch.backends.cudnn.benchmark = chosen.device.type == "cuda"
    with suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return chosen


def threads() -> int:
    """Return how many CPU threads to use: OMP_NUM_THREADS if set, else the cores this process may really use.

    A container with 2 of 64 cores would otherwise run 64 threads, which wait for each other.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked)) if asked.isdigit() else joblib.cpu_count()


def _can_compile(kind: str) -> bool:
    """Return whether this is Linux with the compiler and the headers of Python that torch.compile needs there."""
    variable, default = COMPILERS[kind]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return sys.platform == "linux" and bool(shutil.which(os.environ.get(variable, default))) and headers.exists()


@cache  # compiled once
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)  # kernels for any size would gain nothing on a CPU


def forward(module: nn.Module, x: Tensor) -> Tensor:
    """Return `module(x)`: as a function of both it is compiled once for every module of the same build."""
    return module(x)


def generator(device: torch.device | str, seed: int, *purpose: int | str) -> torch.Generator:
    """Return a generator whose draws depend on (seed, purpose) alone, say (seed, epoch, "views")."""
    words = ".".join(map(str, (seed, *purpose)))
    return torch.Generator(device).manual_seed((zlib.crc32(words.encode()) << 31) ^ zlib.crc32(words[::-1].encode()))


def shuffled_batches(
    rows: Tensor, batch_size: int, rng: torch.Generator, drop_last: bool = False, least: int = 1
) -> Iterator[Tensor]:
    """Yield `rows` in random order, `batch_size` at a time, on their own device.

    With `drop_last` a smaller rest is left out, unless it is all there is; otherwise a rest of fewer than `least` rows
    joins the batch before it: batch norm cannot train on a single row.
    """
    order = rows[torch.randperm(len(rows), generator=rng, device=rng.device).to(rows.device)]
    sizes = batch_sizes(len(rows), batch_size, drop_last, least)
    yield from order[: sum(sizes)].split(sizes)


def batch_sizes(rows: int, batch_size: int, drop_last: bool = False, least: int = 1) -> list[int]:
    """Return how many rows each of the batches of `shuffled_batches` has."""
    full, rest = divmod(rows, batch_size)
    sizes = [batch_size] * full
    if full and not drop_last and rest < least:
        sizes[-1] += rest
    elif rest and not (full and drop_last):
        sizes.append(rest)
    return sizes


def prefetch(inputs: Tensor, batches: Iterable, device: torch.device) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """Yield (index, inputs[index]), the rows on `device`, for each index (int64 or a slice) of `batches`.

    Rows already on the device are picked there. Others, in memory or in a mapped file, are gathered into pinned memory
    by a thread, two batches ahead of their use, and copied without waiting.
    """
    if inputs.device.type == device.type:
        yield from ((index, inputs[index]) for index in batches)
        return
    with ThreadPoolExecutor(1) as reader:
        batches, ahead = iter(batches), deque()
        while True:
            for index in islice(batches, 3 - len(ahead)):
                ahead.append((index, reader.submit(_pinned, inputs, index)))
            if not ahead:
                return
            index, rows = ahead.popleft()
            yield index, rows.result().to(device, non_blocking=True)


def _pinned(inputs: Tensor, index: Tensor) -> Tensor:
    rows = inputs[index]
    return rows.pin_memory() if torch.cuda.is_available() else rows


def to_float(inputs: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]; features, which are floats already, as they are."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def in_parts(module: nn.Module, x: Tensor) -> Tensor:
    """Return `module(x)` of rows that do not see each other: in halves, and halves of those, if memory is too small."""
    try:
        return module(x)
    except torch.OutOfMemoryError:
        if len(x) < 2:
            raise
    torch.cuda.empty_cache()  # after the error, which holds on to what was computed
    return torch.cat([in_parts(module, half) for half in x.chunk(2)])


def within_memory(step: Callable, *batch: Tensor, world: int = 1) -> object:
    """Return `step(*batch)`, a training step; if memory is too small, raise InputError with the batch size that fits.

    Batch norm and contrastive losses see a batch as a whole: in two halves it would give another result. To find what
    fits, smaller batches are tried, which spoils the network; not so where `world` processes train together.
    """
    with suppress(torch.OutOfMemoryError):
        return step(*batch)
    if world > 1:
        raise InputError(f"a GPU's memory is too small for a batch shared by {world}: give a smaller batch_size, or "
                         "more devices")  # fmt: skip
    says = f"the GPU's memory is too small for a batch of {len(batch[0])}, and batch norm must see it whole"
    size = len(batch[0]) // 2
    while size >= 2:
        torch.cuda.empty_cache()
        with suppress(torch.OutOfMemoryError):
            step(*(rows[:size] for rows in batch))
            raise InputError(f"{says}: batch_size={size} fits")
        size //= 2
    raise InputError(f"{says}: not even two rows fit: give a smaller width or image_size")


@torch.inference_mode()
def evaluate(module: nn.Module, inputs: Tensor, place: Place, block: int = 512) -> Tensor:
    """Return `module` of every row of `inputs` (uint8 images or float features), float32 on `place`, in order.

    The module runs in evaluation mode and is left in it.
    """
    module.eval()
    outputs = []
    blocks = (slice(start, start + block) for start in range(0, len(inputs), block))
    for _, rows in prefetch(inputs, blocks, place.device):
        with place.autocast():
            outputs.append(in_parts(module, place.batch(to_float(rows))).float())
    return torch.cat(outputs)


def folds(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Return the fold (0 to number - 1) of each row, int64 [N]: sizes differ by at most one, classes spread evenly.

    A class with fewer rows than folds is simply absent from some of them.
    """
    labels = np.asarray(labels)
    order = np.random.default_rng([seed, number]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # shuffled within each class
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % number
    return fold
