"""The run folder: parameters, records, weights, arrays, results; written atomically, resumable."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype
from safetensors import SafetensorError, safe_open

from ptglab import files
from ptglab.errors import InputError, one_of
from ptglab.files import write
from ptglab.lab import live
from ptglab.lab.notebooks import NOT_IDENTITY
from ptglab.stopping import stoppable
from ptglab.train import checkpoints

RESULT_COLUMNS = [
    "dataset", "labels", "n_train", "backbone", "init", "mode", "loss", "recipe", "noise", "noise_rate",
    "effective_rate", "seed", "accuracy_last", "accuracy_best", "accuracy_selected", "detector", "precision", "recall",
    "f1", "balanced_accuracy", "auroc", "average_precision", "seconds_pretrain", "seconds_finetune", "seconds_detect",
    "device", "torch_version", "commit",
]  # fmt: skip
TEXTS = {"noise", "detector", "dataset", "labels", "backbone", "init", "mode", "loss", "recipe", "device",
         "torch_version", "commit"}  # fmt: skip
OPENED_BY = {"dataset": str, "labels": str, "seed": int, "subset": int, "image_size": int, "budget": str,
             "detector": str}  # fmt: skip
MADE_BY_START = (
    ".lock",
    ".lock.txt",
    "params.json",
    "environment.json",
    "fingerprint.txt",
    "unreadable.csv",
    "seconds.json",
)


class Run:
    """A folder with `params.json`, `metrics.jsonl`, `model.safetensors`, `arrays/`, `results.csv`, `figures/`.

    A stage is a run folder inside a run folder; a finished one carries the marker `done`. `lock` is the lock of a run
    that was started here, held for as long as a Run refers to it. A folder that holds links, pipes or the like is
    refused, see `files.check_plain`.
    """

    def __init__(self, path: str | Path, lock: object = None):
        self.path, self.lock = Path(path), lock
        files.check_plain(self.path)

    @property
    def params(self) -> dict:
        """The parameters the run was started with. Raises InputError if there is no run here, or they are damaged.

        They are texts, numbers and truth values, and those in OPENED_BY have its types and are not negative.
        """
        path = self.path / "params.json"
        try:
            found = files.read_json(path)
            if not isinstance(found, dict) or not all(map(_scalar, found.values())):
                raise ValueError
            for name, kind in OPENED_BY.items():
                if type(value := found.get(name)) not in (kind, type(None)) or (kind is int and (value or 0) < 0):
                    raise ValueError
            return found
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"no run at {self.path}: execute the notebook that makes it first") from None
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged: delete {self.path} and run again, or that file alone if you are sure "
                             "with which parameters the rest was made") from None  # fmt: skip

    def stage(self, name: str) -> "Run":
        """Return the run folder `name` inside this one, made if needed."""
        return Run(self._folder(name), self.lock)

    def _folder(self, name: str) -> Path:
        with files.writing(self.path / name):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        return self.path / name

    @property
    def done(self) -> bool:
        return (self.path / "done").is_file()

    def finish(self) -> None:
        """Mark the run finished and delete its checkpoints."""
        write(self.path / "done", lambda path: path.write_text("finished\n"))
        for path in self.path.glob(f"*{self.checkpoint.name}"):
            checkpoints.drop(path)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def follow(self, steps: Iterable[dict], title: str, epochs: int) -> None:
        """Run `steps` to their end under a progress bar, writing each record to `metrics.jsonl` as it comes.

        In JupyterLab the records are growing curves, and a button stops the run; see `live.watch`. Raises Stopped on
        SIGINT and SIGTERM, and InputError if the disk is full or an earlier record is damaged.
        """
        path = self.path / "metrics.jsonl"
        self._check_checkpoints(epochs)
        if path.exists() and not (content := files.read(path)).endswith(b"\n"):  # a kill tore the last record
            write(path, lambda temporary: temporary.write_bytes(content[: content.rfind(b"\n") + 1]))
        before = self.records().to_dict("records")  # damage is better found before than after
        with stoppable(), live.watch(title, epochs, before) as show:
            for record in steps:
                with files.writing(self.path), open(path, "a", opener=files.own) as file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                show(record)

    def _check_checkpoints(self, epochs: int) -> None:
        """Raise InputError for a checkpoint after more epochs than the run has: it would count as finished."""
        for path in self.path.glob("*checkpoint*.safetensors"):
            if path.is_dir():
                raise InputError(f"{path} is a folder: delete it and run again")
            with suppress(SafetensorError, OSError, ValueError), safe_open(path, "pt") as file:  # `load` says of damage
                if not 0 <= (epoch := int((file.metadata() or {}).get("epoch", 0))) <= epochs:
                    break
        else:
            return
        raise InputError(f"{path} is of epoch {epoch} of another run, this one has {epochs}: delete {self.path} and "
                         "run again")  # fmt: skip

    def records(self) -> pd.DataFrame:
        """Return the records, one row an epoch; an epoch that was repeated after an interruption counts once.

        A last line without an end was torn by a kill and is left out. Raises InputError if another one is damaged.
        """
        path = self.path / "metrics.jsonl"
        *lines, _ = files.read(path).split(b"\n") if path.exists() else [b""]
        found = {}
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if type(record["epoch"]) is not int or not all(map(_number, record.values())):
                    raise ValueError
                found[record["epoch"]] = record
            except (ValueError, TypeError, KeyError, RecursionError):
                raise InputError(f"line {number} of {path} is damaged: delete {self.path} and run again, or that line "
                                 "if its epoch may be missing") from None  # fmt: skip
        return pd.DataFrame([found[epoch] for epoch in sorted(found)])

    def keep_fingerprint(self, fingerprint: str, labels: np.ndarray | None = None) -> None:
        """Keep the fingerprint of this run's images, and of its `labels` where they come from another run.

        Raises InputError if the run was begun with others.
        """
        path = self.path / "fingerprint.txt"
        if labels is not None:
            fingerprint += f" {hashlib.sha256(np.asarray(labels).astype('<i8').tobytes()).hexdigest()}"
        if not path.exists():
            write(path, lambda temporary: temporary.write_text(fingerprint))
        elif files.read(path) != fingerprint.encode():
            raise InputError(f"{self.path} was begun with other images or labels, or they have changed since: "
                             "give another run_dir, or delete that folder")  # fmt: skip

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Write `arrays/name.npy`; arrays of Python objects are refused."""

        def save(path: Path) -> None:
            with open(path, "wb") as file:
                plain = SimpleNamespace(write=file.write)  # writing a real file, NumPy hides why it failed
                np.save(plain, np.asarray(array), allow_pickle=False)

        write(self._folder("arrays") / f"{name}.npy", save)

    def growing_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return `arrays/name.npy`, float32 of `shape`, mapped for writing: new, or as it was left.

        Its place on the disk is taken at once. Raises InputError if there is none, or if what was left is damaged.
        """
        path = self._folder("arrays") / f"{name}.npy"

        def make(temporary: Path) -> None:
            np.lib.format.open_memmap(temporary, "w+", np.float32, shape).flush()
            with open(temporary, "r+b") as file:
                files.allocate(file, os.path.getsize(temporary))

        if not path.exists():
            write(path, make)
        array = self._mapped(path, "r+")
        if array.shape != shape or array.dtype != np.float32:
            raise InputError(f"{path} holds {array.dtype} {array.shape} where float32 {shape} is expected: "
                             f"delete {self.path} and run again")  # fmt: skip
        return array

    def array(self, name: str) -> np.ndarray:
        """Return `arrays/name.npy`, memory-mapped. Raises InputError naming the arrays that exist, or if damaged."""
        stored = {path.stem: path for path in sorted((self.path / "arrays").glob("*.npy"))}
        if name not in stored:
            raise InputError(f"no array '{name}' in {self.path}: there are {', '.join(stored) or 'none'}")
        return self._mapped(stored[name], "r")

    def _mapped(self, path: Path, mode: str) -> np.ndarray:
        """Return an array on disk, mapped; arrays of Python objects are refused."""
        if path.is_dir():
            raise InputError(f"{path} is a folder: delete {self.path} and run again")
        try:
            np.lib.format.open_memmap(path, "r")  # "r+" would fill up a file that is too short
            return np.lib.format.open_memmap(path, mode)
        except OSError:
            raise
        except Exception:  # whatever a damaged header leads to
            raise InputError(f"{path} is damaged: delete {self.path} and run again") from None

    def labels(self, ids: list[str], dataset: str) -> dict[str, np.ndarray]:
        """Return `labels_given` and `labels_true`, int64 [N], stored for the images `ids` of `dataset`.

        Raises InputError if there is no such run, or if it holds the labels of other images.
        """
        params = self.params
        if params.get("dataset") != dataset or not np.array_equal(self.array("ids"), ids):
            made = ", ".join(f"{name} {params.get(name)!r}" for name in ("dataset", "labels", "subset", "seed"))
            raise InputError(f"{self.path} holds labels of other images ({made}): give this notebook the same")
        return {name: np.array(self.array(name)) for name in ("labels_given", "labels_true")}

    def save_results(self, rows: Iterable[dict]) -> pd.DataFrame:
        """Write `results.csv`, one row a result, and return it; unknown columns are refused, missing ones empty."""
        rows = list(rows)
        for column in {name for row in rows for name in row}:
            one_of("result column", column, RESULT_COLUMNS)
        frame = pd.DataFrame([stamp() | row for row in rows], columns=RESULT_COLUMNS)
        self.save_table("results", frame)
        return frame

    def results(self) -> pd.DataFrame:
        """Return `results.csv`; missing figures are NaN. Raises InputError if it is not there, or no table of results.

        Every one of RESULT_COLUMNS is there, and those that are no TEXTS hold numbers.
        """
        path = self.path / "results.csv"
        try:
            found = files.read_csv(path)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"no results in {self.path}: execute the notebook that makes them first") from None
        missing = [name for name in RESULT_COLUMNS if name not in found]
        odd = [name for name in set(found) & set(RESULT_COLUMNS) - TEXTS if not is_numeric_dtype(found[name])]
        if missing or odd or found.empty:
            why = f"no column {missing[0]}" if missing else f"no numbers in {min(odd)}" if odd else "no rows"
            raise InputError(f"{path} is no table of results, it has {why}: delete it and run again")
        return found

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write `name.csv`; see `files.write_csv`."""
        files.write_csv(self.path / f"{name}.csv", table)

    def save_figure(self, name: str, figure, drawn_from: pd.DataFrame | None = None) -> None:
        """Write a matplotlib figure as `figures/name.png`, and the table it was drawn from as `figures/name.csv`."""
        path = self._folder("figures") / f"{name}.png"
        write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))
        if drawn_from is not None:
            files.write_csv(path.with_suffix(".csv"), drawn_from)


def start(path: str | Path, changeable: Iterable[str] = (), **params) -> Run:
    """Open the run folder at `path`, made if needed; store `params` there, and in `environment.json` where they ran.

    No other process may start a run there until this Run, or its process, is gone; reading needs no start. A folder
    that holds a run with the same parameters, except those `changeable`, is resumed. Raises InputError, with the
    difference, if they are others, if another process is at work there, if the folder cannot be written, or if it holds
    what no run writes.
    """
    changeable = set(changeable)
    with files.writing(path, every=True):
        Path(path).mkdir(parents=True, exist_ok=True)
    run = Run(path)
    run.lock = files.hold(run.path, "process")
    stored = run.params if (run.path / "params.json").exists() else {}
    different = [
        f"{name} {stored.get(name)!r} there, {params.get(name)!r} here"
        for name in sorted(stored.keys() | params.keys())
        if stored and name not in NOT_IDENTITY | changeable and stored.get(name) != params.get(name)
    ]
    if different:
        raise InputError(f"{path} holds a run with other parameters ({'; '.join(different)}): "
                         "give another run_dir, or delete that folder")  # fmt: skip
    files.drop_torn(run.path)
    files.write_json(run.path / "params.json", stored | {n: params[n] for n in changeable} if stored else params)
    noted = run.path / "environment.json"
    try:
        known = list(files.read_json(noted))
    except (OSError, ValueError, TypeError):
        known = []
    if (here := environment()) not in known[-1:]:
        files.write_json(noted, [*known, here])
    return run


def discard(path: str | Path) -> None:
    """Delete what a refused `start` left in a folder that was not there before it, and the folder if it is empty then.

    Nothing else is deleted, and nothing at all while another process is at work there.
    """
    path = Path(path)
    with suppress(InputError, OSError), files.lock(path, "process", shared=True):
        for name in MADE_BY_START:
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def _scalar(value: object) -> bool:
    """Return whether `value` can be a parameter: a text, a truth value, a number of 64 bits, or none."""
    return value is None or type(value) in (str, bool) or _number(value)


def _number(value: object) -> bool:
    """Return whether `value` is a number that 64 bits can hold, or a truth value."""
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def environment() -> dict[str, str]:
    """Return what a run may depend on beside its parameters: versions, the commit, the hardware."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    about = {"python": platform.python_version(), "commit": commit(), "machine": platform.node(), "gpu": gpu}
    return about | {"system": platform.platform(), "processor": platform.machine()} | versions


def stamp() -> dict[str, str]:
    """Return where a result was measured: the version of torch and the commit."""
    return {"torch_version": torch.__version__, "commit": commit()}


def commit() -> str:
    """Return the commit of the checkout ptglab runs from, with `+` if it was changed since; empty if installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()


def hardware(device: torch.device) -> str:
    """Return the device in words: the GPU's name, or the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
