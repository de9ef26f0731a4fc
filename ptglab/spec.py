"""What a sweep is: a YAML file that is checked whole, and the cells it stands for."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ptglab import data, execution, finetune, label_errors, noise, pretrain, recipes, runs
from ptglab.backbones import BACKBONES
from ptglab.errors import InputError, one_of

Value = bool | int | float | str
PATHS = {"dataset", "source", "weights", "stand_in"}  # parameters that may name a file; a cell has a folder of its own
# What a notebook would refuse at its start is refused before any starts; lists are separated by commas.
CHOICES = {
    "method": pretrain.METHODS, "mode": finetune.MODES, "recipe": recipes.RECIPES, "backbone": BACKBONES,
    "noise_kind": noise.KINDS, "schedule": pretrain.SCHEDULES, "detectors": label_errors.DETECTORS,
}  # fmt: skip


class Part(BaseModel):
    """What stages and grids have in common; parameters are those of its notebook."""

    model_config = ConfigDict(extra="forbid", strict=True)
    notebook: str
    parameters: dict[str, Value | list[Value]] = {}
    seconds: float = 0.0  # one run of it, when last measured; for the estimate of time


class Stage(Part):
    """A run that cells share, which name it by `@` and its name; `shares` are the cells' parameters it depends on."""

    shares: list[str] = ["seed"]


class Spec(BaseModel):
    """A sweep. `parameters` go to every notebook that declares them; each grid is the product of its lists."""

    model_config = ConfigDict(extra="forbid", strict=True)
    title: str
    parameters: dict[str, Value] = {}
    stages: dict[str, Stage] = {}
    grids: list[Part]


@dataclass(frozen=True)
class Cell:
    """One execution of a notebook: `name` is its folder below the sweep's, `needs` the cells that come first."""

    name: str
    notebook: str
    parameters: dict[str, Value]
    needs: tuple[str, ...] = ()
    seconds: float = 0.0

    def finished(self, out: Path) -> bool:
        return (out / self.name / "notebook.ipynb").exists()


def read(path: str | Path, overrides: dict[str, str] | None = None) -> Spec:
    """Return the spec at `path`, a YAML file or the name of one of ours, its `parameters` replaced by `overrides`.

    Overrides are texts, read as YAML. Raises InputError, in one line, for whatever is no spec.
    """
    path = _spec_path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        given = {name: yaml.safe_load(text) for name, text in (overrides or {}).items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no sweep: it must hold title, parameters, stages and grids")
    try:
        spec = Spec(**found)
    except (ValidationError, TypeError) as error:
        raise InputError(f"{path}: {_first(error)}") from None
    spec.parameters.update(given)
    return spec


def names() -> list[str]:
    """Return the names of our sweeps."""
    return [path.stem for path in sorted(_folder().glob("*.yaml"))]


def published() -> pd.DataFrame:
    """Return the figures that others published, one a row, with their source."""
    return pd.read_csv(_folder() / "published.csv")


def plan(spec: Spec) -> list[Cell]:
    """Return every cell of `spec`, stages before the cells that share them, all checked.

    Raises InputError for a notebook, parameter, stage, value or label column that is not there, a value of another
    type, an empty grid, and a cell that is there twice.
    """
    if not spec.grids:
        raise InputError("the sweep has no grids: nothing to run")
    parts = [*spec.stages.values(), *spec.grids]
    declared = {part.notebook: execution.declared_parameters(part.notebook) for part in parts}
    everywhere = {name for names in declared.values() for name in names}
    for name in spec.parameters:
        one_of("parameter of any notebook of the sweep", name, everywhere)
    stages, cells = {}, {}
    points = [(grid, point) for number, grid in enumerate(spec.grids, 1) for point in _points(grid, number)]
    several = {"init", "mode"} | {n for grid in spec.grids for n, v in grid.parameters.items() if isinstance(v, list)}
    for grid, point in points:
        values, needs = _values(grid, spec.parameters, point, declared), []
        for name, value in values.items():
            if isinstance(value, str) and value.startswith("@"):
                stage = _stage(spec, value[1:].format(**values), values, declared)
                stages.setdefault(stage.name, stage)
                values[name] = stage.name
                needs.append(stage.name)
        name = f"cells/{_folder_name(grid.notebook, values, {n: values[n] for n in point if n in several})}"
        if name in cells:
            raise InputError(f"two cells of the sweep are the same, and would share the folder {name}")
        cells[name] = Cell(name, grid.notebook, values, tuple(needs), grid.seconds)
    _check_values([*stages.values(), *cells.values()])
    return [*stages.values(), *cells.values()]


def _points(grid: Part, number: int) -> Iterator[dict[str, Value]]:
    """Yield the parameters of every cell of a grid, the last list fastest."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in grid.parameters.items()}
    for name, values in lists.items():
        if not values:
            raise InputError(f"grid {number} is empty: its parameter '{name}' has no values")
    for values in product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _values(part: Part, common: dict, own: dict, declared: dict) -> dict[str, Value]:
    """Return all parameters of a notebook but run_dir: its defaults, then the sweep's, then its own; checked."""
    defaults = declared[part.notebook]
    given = {name: value for name, value in common.items() if name in defaults} | own
    execution.checked(part.notebook, defaults, given)
    if "run_dir" in given:
        raise InputError("run_dir is the sweep's to choose: a folder for each cell below --out")
    values = {name: type(default)(given.get(name, default)) for name, default in defaults.items() if name != "run_dir"}
    for name in PATHS & values.keys():
        source = data.located(values[name])
        values[name] = str(Path(source).resolve()) if source not in data.NAMES and os.path.exists(source) else source
    return values


def _stage(spec: Spec, name: str, cell: dict, declared: dict) -> Cell:
    """Return the stage that a cell with these parameters names."""
    stage = spec.stages[one_of("stage", name, spec.stages)]
    for shared in stage.shares:
        one_of(f"parameter of the cells that share stage {name}", shared, cell)
    own = stage.parameters | {n: cell[n] for n in stage.shares}
    if lists := [n for n, v in own.items() if isinstance(v, list)]:
        raise InputError(f"stage {name} has a list for '{lists[0]}': only grids take lists")
    values = _values(stage, spec.parameters, own, declared)
    folder = _folder_name(stage.notebook, values, {"stage": name} | {n: cell[n] for n in stage.shares})
    return Cell(f"stages/{folder}", stage.notebook, values, seconds=stage.seconds)


def _folder_name(notebook: str, values: dict, shown: dict) -> str:
    """Return a folder name that a person can read, and that no other parameters have."""
    identity = {name: value for name, value in values.items() if name not in runs.NOT_IDENTITY}
    key = hashlib.sha256(json.dumps([Path(notebook).stem, identity], sort_keys=True).encode()).hexdigest()[:8]
    words = [str(value) if isinstance(value, str) else f"{name}{value}" for name, value in shown.items() if value != ""]
    words = "-".join(re.sub(r"[^\w.]+", "_", Path(word).name) for word in words if not word.startswith("stages/"))
    return f"{words[:80]}-{key}".lstrip("-")


def _check_values(cells: list[Cell]) -> None:
    """Raise InputError for a value that a notebook would refuse, and for images or a label column not there."""
    for name, choices in CHOICES.items():
        for value in {cell.parameters[name] for cell in cells if name in cell.parameters}:
            for one in value.split(",") if name in ("detectors", "mode") else [value]:
                one_of(name, one, choices)
    for source, labels in {(c.parameters["dataset"], c.parameters.get("labels", "")) for c in cells
                           if "dataset" in c.parameters}:  # fmt: skip
        data.check_labels(source, labels)


def _first(error: ValidationError | TypeError) -> str:
    """Return the first complaint of pydantic in a line, with the nearest valid name."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # what it misspells is missing, too
    where = ".".join(str(part) for part in first["loc"] if part not in ("bool", "int", "float", "str"))
    if first["type"] == "extra_forbidden":
        *inside, name = first["loc"]
        known = Stage if inside[:1] == ["stages"] else Part if inside[:1] == ["grids"] else Spec
        try:
            one_of("name in " + ".".join(map(str, inside or ["the sweep"])), str(name), known.model_fields)
        except InputError as unknown:
            return str(unknown)
    return f"{where}: {first['msg']}"


def _folder() -> Path:
    return execution.notebook_path("00_quickstart").parent / "sweeps"


def _spec_path(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    if Path(path).suffix or Path(path).name != str(path):
        raise InputError(f"no such sweep: {path}")
    return _folder() / f"{one_of('sweep', str(path), names())}.yaml"
