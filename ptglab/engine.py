"""Where it runs and in which order: device, precision, memory format, seeded draws, batches, folds."""

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ptglab.errors import InputError, one_of

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """A device with how to compute there. Convolutions run channels-last, which is faster on both kinds."""

    device: torch.device
    precision: str

    def put(self, module: nn.Module) -> nn.Module:
        """Move `module` there, its filters channels-last."""
        return module.to(self.device, memory_format=torch.channels_last)

    def batch(self, x: Tensor) -> Tensor:
        """Move a batch there; images [B, C, H, W] become channels-last."""
        x = x.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def autocast(self) -> AbstractContextManager:
        """Return the context the network's forward runs in; losses stay outside, in float32."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()


def place(device: str = "auto", precision: str = "auto") -> Place:
    """Choose where to run: `auto` is CUDA with bfloat16 where there is a GPU, otherwise the CPU with float32.

    Raises InputError for a device that is not there or an unknown precision.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise InputError(f"unknown device '{device}': use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device '{device}' is not here ({torch.cuda.device_count()} CUDA devices): use device=cpu")
    if precision == "auto":
        precision = "bfloat16" if chosen.type == "cuda" else "float32"
    return Place(chosen, one_of("precision", precision, PRECISIONS))


def generator(device: torch.device | str, seed: int, *purpose: int | str) -> torch.Generator:
    """Return a generator whose draws depend on (seed, purpose) alone, say (seed, epoch, "views")."""
    words = ".".join(map(str, (seed, *purpose)))
    return torch.Generator(device).manual_seed((zlib.crc32(words.encode()) << 31) ^ zlib.crc32(words[::-1].encode()))


def shuffled_batches(rows: Tensor, batch_size: int, draws: torch.Generator, drop_last: bool) -> Iterator[Tensor]:
    """Yield `rows` in random order, `batch_size` at a time, on their own device.

    With `drop_last` a smaller rest is left out, unless it is all there is.
    """
    order = rows[torch.randperm(len(rows), generator=draws, device=draws.device).to(rows.device)]
    batches = order.split(batch_size)
    if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
        batches = batches[:-1]
    yield from batches


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool) -> int:
    """Return how many batches `shuffled_batches` yields."""
    return max(1, rows // batch_size) if drop_last else -(-rows // batch_size)


def unit(inputs: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]; features, which are floats already, as they are."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


@torch.inference_mode()
def evaluate(module: nn.Module, inputs: Tensor, place: Place, block: int = 512) -> Tensor:
    """Return `module` of every row of `inputs` (uint8 images or float features), float32 on `place`, in order.

    The module runs in evaluation mode and is left in it.
    """
    module.eval()
    outputs = []
    for rows in inputs.split(block):
        with place.autocast():
            outputs.append(module(place.batch(unit(rows.to(place.device)))).float())
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
