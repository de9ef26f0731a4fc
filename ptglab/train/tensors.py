"""Tensors on disk: safetensors with a checksum, so that a file that was cut or changed is known for it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptglab.errors import InputError
from ptglab.files import write


class Damaged(InputError):
    """A file does not hold what was written; the message is the reason, without the path."""


def save(path: str | Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write `tensors` and the texts `about` them to `path`, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = about | {"checksum": "sha256", "sha256": _checksum(tensors, about)}
    write(Path(path), lambda temporary: save_file(tensors, temporary, metadata=about))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, about) as given to `save`.

    Raises FileNotFoundError if there is no such file, and Damaged if it is no safetensors file or its content is not
    that of its checksum; a file without a checksum is taken as it is.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise Damaged(" ".join(str(error).split())[:200]) from None
    said = about.pop("checksum", None), about.pop("sha256", None)
    if any(said) and said != ("sha256", _checksum(tensors, about)):
        raise Damaged("its bytes are not those that were written")
    return tensors, about


def _checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    """Return the hex SHA-256 of names, types, shapes, texts and bytes."""
    names = sorted(tensors)
    shapes = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    digest = hashlib.sha256(json.dumps([shapes, about], sort_keys=True).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
