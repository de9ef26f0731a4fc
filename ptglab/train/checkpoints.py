"""Checkpoints: the state after an epoch, of which the one before is kept until the new one is whole."""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ptglab import files
from ptglab.errors import InputError
from ptglab.train import collectives, tensors


def previous(path: str | Path) -> Path:
    """Return where the checkpoint before the one at `path` is kept."""
    return Path(path).with_suffix(f".previous{Path(path).suffix}")


def save(path: str | Path | None, epoch: int, optimizer: torch.optim.Optimizer, **modules) -> None:
    """Write the state after `epoch` epochs: every module, every optimizer tensor. Without a `path`, do nothing.

    Of processes that train together, the first one writes.
    At any moment a whole checkpoint is at `path` or at `previous(path)`. Raises InputError if the disk is full.
    """
    if path is None or collectives.rank():
        return
    path = Path(path)
    state = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{i}/{k}": v for k, v in values.items()}
    with files.writing(path.parent):
        if path.exists():
            os.replace(path, previous(path))
    tensors.save(path, state, {"epoch": str(epoch)})


def load(path: str | Path | None, optimizer: torch.optim.Optimizer, **modules) -> int:
    """Load what `save` wrote, strictly, and return how many epochs are done; 0 if there is nothing.

    A damaged file gives way to the previous one, and a damaged previous one to a new start, which is said on stderr;
    it is deleted. Processes that train together all get what the first one reads. Raises InputError if the file belongs
    to another network.
    """
    if path is None:
        return 0
    if not (found := collectives.told(_found, path)):
        return 0
    candidate, state, epoch = found
    _restore(candidate, state, optimizer, modules)
    return epoch


def _found(path: str | Path) -> tuple[Path, dict[str, Tensor], int] | None:
    """Return the newest whole checkpoint, its file, its state and its epochs; None if there is none."""
    damaged = []
    for candidate in (Path(path), previous(path)):
        try:
            state, about = tensors.load(candidate)
            epoch = int(about["epoch"])
        except FileNotFoundError:
            continue
        except (tensors.Damaged, KeyError, ValueError) as error:
            damaged.append(f"{candidate} is damaged ({error})")
            candidate.unlink()  # it must not take the place of a whole one
            continue
        if damaged:
            _say(f"{damaged[0]}: going on from the one before it, after epoch {epoch}")
        return candidate, state, epoch
    if damaged:
        _say(f"{'; '.join(damaged)}: there is no whole one, this stage starts anew")
    return None


def drop(path: Path) -> None:
    """Delete both checkpoints, where they are."""
    path.unlink(missing_ok=True)
    previous(path).unlink(missing_ok=True)


def diverged(epoch: int, checkpoint: str | Path | None) -> str:
    """Return the one line a run ends with when its loss is no longer finite."""
    kept = f"the last good state is {checkpoint}" if checkpoint and Path(checkpoint).exists() else "nothing was kept"
    return f"the loss is not finite in epoch {epoch}; {kept}; a lower learning_rate usually mends it"


def _restore(path: Path, state: dict[str, Tensor], optimizer: torch.optim.Optimizer, modules: dict) -> None:
    """Put `state` into the modules and the optimizer."""
    try:
        for name, module in modules.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")}
            module.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be resumed: {str(error).splitlines()[0]}; delete it to start anew") from None
    moments: dict[int, dict] = {}
    for key, value in state.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/")
            moments.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _say(line: str) -> None:
    """Print a line to stderr, clear of a progress bar."""
    tqdm.write(line, file=sys.stderr)
