"""The run folder: parameters, records, weights, arrays, results; written atomically, resumable."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ptglab.errors import InputError, one_of

RESULT_COLUMNS = [
    "dataset",
    "labels",
    "n_train",
    "backbone",
    "init",
    "mode",
    "loss",
    "recipe",
    "noise",
    "noise_rate",
    "effective_rate",
    "seed",
    "accuracy_last",
    "accuracy_best",
    "accuracy_selected",
    "detector",
    "precision",
    "recall",
    "f1",
    "balanced_accuracy",
    "auroc",
    "average_precision",
    "seconds_pretrain",
    "seconds_finetune",
    "seconds_detect",
    "device",
    "torch_version",
    "commit",
]
NOT_IDENTITY = {"run_dir", "device"}  # parameters that do not change what a run computes


class Run:
    """A folder with `params.json`, `metrics.jsonl`, `model.safetensors`, `arrays/`, `results.csv`, `figures/`.

    A stage is a run folder inside a run folder; one that is finished carries the marker `done`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def params(self) -> dict:
        """The parameters the run was started with. Raises InputError if there is no run here."""
        try:
            return json.loads((self.path / "params.json").read_text())
        except FileNotFoundError:
            raise InputError(f"no run at {self.path}: execute the notebook that makes it first") from None

    def stage(self, name: str) -> "Run":
        """Return the run folder `name` inside this one, made if needed."""
        inner = Run(self.path / name)
        inner.path.mkdir(parents=True, exist_ok=True)
        return inner

    @property
    def done(self) -> bool:
        return (self.path / "done").exists()

    def finish(self) -> None:
        """Mark the run finished and drop its checkpoint."""
        write(self.path / "done", lambda path: path.write_text("finished\n"))
        self.checkpoint.unlink(missing_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def follow(self, steps: Iterable[dict], title: str, epochs: int) -> None:
        """Run `steps` to their end under a progress bar, each record written to `metrics.jsonl` as it comes."""
        _drop_torn_line(self.path / "metrics.jsonl")
        with tqdm(total=epochs, desc=title, unit=" epochs", mininterval=1) as bar:
            for record in steps:
                with open(self.path / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
                bar.update(record["epoch"] - bar.n)

    def records(self) -> pd.DataFrame:
        """Return the records, one row an epoch; an epoch that was run again after an interruption counts once."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return pd.DataFrame()
        frame = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
        return frame.drop_duplicates("epoch", keep="last").sort_values("epoch", ignore_index=True)

    def keep_fingerprint(self, fingerprint: str) -> None:
        """Keep what tells the images and labels of this run; raise InputError if it was begun with others."""
        path = self.path / "fingerprint.txt"
        if path.exists() and path.read_text() != fingerprint:
            raise InputError(f"{self.path} was begun with other images or labels, or they have changed since: "
                             "give another run_dir, or delete that folder")  # fmt: skip
        write(path, lambda temporary: temporary.write_text(fingerprint))

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Write `arrays/name.npy`; arrays of Python objects are refused."""
        (self.path / "arrays").mkdir(exist_ok=True)

        def save(path: Path) -> None:
            with open(path, "wb") as file:
                np.save(file, np.asarray(array), allow_pickle=False)

        write(self.path / "arrays" / f"{name}.npy", save)

    def growing_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return `arrays/name.npy`, float32 of `shape`, mapped for writing: new, or as it was left."""
        path = self.path / "arrays" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write(path, lambda temporary: np.lib.format.open_memmap(temporary, "w+", np.float32, shape).flush())
        return np.lib.format.open_memmap(path, "r+")

    def array(self, name: str) -> np.ndarray:
        """Return `arrays/name.npy`, memory-mapped. Raises InputError naming the arrays that exist."""
        stored = sorted(path.stem for path in (self.path / "arrays").glob("*.npy"))
        if name not in stored:
            raise InputError(f"no array '{name}' in {self.path}: there are {', '.join(stored) or 'none'}")
        return np.load(self.path / "arrays" / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def labels(self, ids: list[str], dataset: str) -> dict[str, np.ndarray]:
        """Return `labels_given` and `labels_true`, int64 [N], stored for the images `ids` of `dataset`.

        Raises InputError if there is no such run, or if it holds the labels of other images.
        """
        params = self.params
        if params.get("dataset") != dataset or not np.array_equal(self.array("ids"), ids):
            asked = ", ".join(f"{name} {params.get(name)!r}" for name in ("dataset", "labels", "subset", "seed"))
            raise InputError(
                f"{self.path} holds labels of other images ({asked}): give this notebook the same parameters"
            )
        return {name: np.array(self.array(name)) for name in ("labels_given", "labels_true")}

    def save_results(self, rows: Iterable[dict]) -> pd.DataFrame:
        """Write `results.csv`, one row a result, and return it; an unknown column is refused, a missing one empty."""
        rows = list(rows)
        for column in {name for row in rows for name in row}:
            one_of("result column", column, RESULT_COLUMNS)
        frame = pd.DataFrame([stamp() | row for row in rows], columns=RESULT_COLUMNS)
        self.save_table("results", frame)
        return frame

    def results(self) -> pd.DataFrame:
        """Return `results.csv`; missing figures are NaN. Raises InputError if it is not there."""
        try:
            return pd.read_csv(self.path / "results.csv", dtype={"commit": str})  # one may be all digits
        except FileNotFoundError:
            raise InputError(f"no results in {self.path}: execute the notebook that makes them first") from None

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write `name.csv`."""
        write(self.path / f"{name}.csv", lambda path: table.to_csv(path, index=False))

    def save_figure(self, name: str, figure, drawn_from: pd.DataFrame | None = None) -> None:
        """Write a matplotlib figure as `figures/name.png`, and the figures it was drawn from as `figures/name.csv`."""
        (self.path / "figures").mkdir(exist_ok=True)
        path = self.path / "figures" / f"{name}.png"
        write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))
        if drawn_from is not None:
            write(path.with_suffix(".csv"), lambda temporary: drawn_from.to_csv(temporary, index=False))


def _drop_torn_line(path: Path) -> None:
    """Cut what stands after the last line end: a record that a kill left half-written; its epoch is run again."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        write(path, lambda temporary: temporary.write_bytes(content[: content.rfind(b"\n") + 1]))


def start(path: str | Path, changeable: Iterable[str] = (), **params) -> Run:
    """Open the run folder at `path`, made if needed, and snapshot `params` into it.

    A folder that holds a run with the same parameters, those `changeable` aside, is gone on with. Raises InputError,
    with the difference, if it holds one with others, or if the folder cannot be written.
    """
    run, changeable = Run(path), set(changeable)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        stored = run.params if (run.path / "params.json").exists() else {}
        different = [
            f"{name} {stored.get(name)!r} there, {params.get(name)!r} here"
            for name in sorted(stored.keys() | params.keys())
            if stored and name not in NOT_IDENTITY | changeable and stored.get(name) != params.get(name)
        ]
        if different:
            raise InputError(f"{path} holds a run with other parameters ({'; '.join(different)}): "
                             "give another run_dir, or delete that folder")  # fmt: skip
        kept = stored | {name: params[name] for name in changeable} if stored else params
        if not stored or kept != stored:
            write(run.path / "params.json", lambda p: p.write_text(json.dumps(kept, indent=1) + "\n"))
    except OSError as error:
        raise InputError(f"cannot write the run folder {path}: {error.strerror}") from None
    return run


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write a file beside `path`, flush it to disk, and put it in place in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path | None, epoch: int, optimizer: torch.optim.Optimizer, **modules) -> None:
    """Write the state after `epoch` epochs: every module, every optimizer tensor. Without a `path`, do nothing."""
    if path is None:
        return
    tensors = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{k}": v for k, v in state.items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write(Path(path), lambda p: save_file(tensors, p, metadata={"epoch": str(epoch)}))


def load_checkpoint(path: str | Path | None, optimizer: torch.optim.Optimizer, **modules) -> int:
    """Load what `save_checkpoint` wrote, strictly, and return how many epochs are done; 0 if there is nothing.

    Raises InputError if the file is damaged or belongs to another network.
    """
    if path is None or not Path(path).exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            epoch = int(file.metadata()["epoch"])
        tensors = load_file(path)
        for name, module in modules.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
            module.load_state_dict(own, strict=True)
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be resumed: {str(error).splitlines()[0]}; delete it to start anew") from None
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return epoch


def diverged(epoch: int, checkpoint: str | Path | None) -> str:
    """Return the one line a run ends with when its loss is no longer finite."""
    kept = f"the last good state is {checkpoint}" if checkpoint and Path(checkpoint).exists() else "nothing was kept"
    return f"the loss is not finite in epoch {epoch}; {kept}; a lower learning_rate usually mends it"


def stamp() -> dict:
    """Return where a result was measured: the versions and the commit."""
    return {"torch_version": torch.__version__, "commit": commit()}


def commit() -> str:
    """Return the commit of the checkout ptglab runs from, with `+` if it was changed since; empty if installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()


def hardware(device: torch.device) -> str:
    """Return the device in words: the GPU's name, or the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
