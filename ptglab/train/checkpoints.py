"""Tensors and training states on disk: safetensors with a checksum; a checkpoint stays until the next one is whole."""

import hashlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ptglab.errors import InputError
from ptglab.files import write, writing


class Damaged(InputError):
    """A file does not hold what was written; the message is the reason, without the path."""


def write_tensors(path: str | Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write `tensors`, and the texts `about` them, to `path`: the whole file or nothing."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = about | {"checksum": "sha256", "sha256": checksum(tensors, about)}
    write(Path(path), lambda temporary: save_file(tensors, temporary, metadata=about))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, about) as they were given to `write_tensors`.

    Raises FileNotFoundError if there is no such file, and Damaged if it is no safetensors file or does not match its
    checksum. A file without one is accepted as it is.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise Damaged(" ".join(str(error).split())[:200]) from None
    stored = about.pop("checksum", None), about.pop("sha256", None)
    if any(stored) and stored != ("sha256", checksum(tensors, about)):
        raise Damaged("its bytes are not those that were written")
    return tensors, about


def checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    """Return the hex SHA-256 of names, types, shapes, texts and bytes."""
    named = sorted(tensors.items())
    shapes = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in named]
    digest = hashlib.sha256(json.dumps([shapes, about], sort_keys=True).encode())
    for _, tensor in named:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def previous(path: str | Path) -> Path:
    """Return where the checkpoint before the one at `path` is kept."""
    return Path(path).with_suffix(f".previous{Path(path).suffix}")


def save(path: str | Path | None, epoch: int, optimizer: torch.optim.Optimizer, **modules) -> None:
    """Write the state after `epoch` epochs: every module and the optimizer. Without a `path`, do nothing.

    At any moment there is a whole checkpoint at `path` or at `previous(path)`. Raises InputError if the disk is full.
    """
    if path is None:
        return
    path = Path(path)
    state = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{i}/{k}": v for k, v in values.items()}
    with writing(path.parent):
        if path.exists():
            os.replace(path, previous(path))
    write_tensors(path, state, {"epoch": str(epoch)})


def load(path: str | Path | None, optimizer: torch.optim.Optimizer, **modules) -> int:
    """Load what `save` wrote, strictly, and return how many epochs are done; 0 if there is nothing.

    A damaged checkpoint is deleted, with a message on stderr, and the previous one is loaded instead; if that is
    damaged too, training starts anew. Raises InputError if the file belongs to another network.
    """
    damaged, state, epoch = [], None, 0
    for candidate in (Path(path), previous(path)) if path else ():
        try:
            state, about = read_tensors(candidate)
            epoch = int(about["epoch"])
            break
        except FileNotFoundError:
            continue
        except (Damaged, KeyError, ValueError) as error:
            damaged.append(f"{candidate} is damaged ({error})")
            candidate.unlink(missing_ok=True)  # it must not take the place of a whole one
    if damaged:
        rest = f"going on from the one before it, after epoch {epoch}" if epoch else "this stage starts anew"
        tqdm.write(f"{'; '.join(damaged)}: {rest}", file=sys.stderr)  # without breaking a progress bar
    if epoch:
        _restore(candidate, state, optimizer, modules)
    return epoch


def drop(path: Path) -> None:
    """Delete both checkpoints, if they exist."""
    path.unlink(missing_ok=True)
    previous(path).unlink(missing_ok=True)


def diverged(epoch: int, checkpoint: str | Path | None) -> str:
    """Return the message a run ends with when its loss is no longer finite."""
    kept = f"the last good state is {checkpoint}" if checkpoint and Path(checkpoint).exists() else "nothing was kept"
    return f"the loss is not finite in epoch {epoch}; {kept}; a lower learning_rate usually mends it"


def _restore(path: Path, state: dict[str, Tensor], optimizer: torch.optim.Optimizer, modules: dict) -> None:
    """Load `state` into the modules and the optimizer."""
    try:
        for name, module in modules.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")}
            module.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be resumed: {str(error).splitlines()[0]}; delete it to start anew") from None
    moments: dict[int, dict] = defaultdict(dict)
    for key in state:
        if key.startswith("optimizer/"):
            _, i, name = key.split("/")
            moments[int(i)][name] = state[key]
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
