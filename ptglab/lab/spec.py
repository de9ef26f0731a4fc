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

from ptglab import data
from ptglab.data import noise
from ptglab.detect import cleaning as recipes
from ptglab.detect import label_errors
from ptglab.errors import InputError, one_of
from ptglab.lab import notebooks, runs
from ptglab.train import finetune, pretrain
from ptglab.train.backbones import BACKBONES

MAX_SPEC, MAX_NODES = 1 << 20, 100_000  # bytes of a sweep's file, and values in it with every alias written out
Value = bool | int | float | str
PATHS = {"dataset", "source", "weights", "stand_in"}  # parameters that may name a file; a cell has a folder of its own
SHOWN = ("init", "method", "mode", "recipe", "noise_kind", "noise_rate", "labels", "seed")  # in the name of a folder
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
    """Return the spec at `path`, a YAML file or the name of one of ours.

    `overrides` are texts, read as YAML, in the place of its parameters and of its grids'. Raises InputError, in one
    line, for whatever is no spec.
    """
    path = _spec_path(path)
    try:
        found = _yaml(path.read_text(encoding="utf-8") if path.stat().st_size <= MAX_SPEC else None)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
    try:
        given = {name: _yaml(text) for name, text in (overrides or {}).items()}
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"a parameter cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no sweep: it must hold title, parameters, stages and grids")
    try:
        spec = Spec(**found)
    except (ValidationError, TypeError) as error:
        raise InputError(f"{path}: {_first(error)}") from None
    for grid in spec.grids:
        grid.parameters.update({name: value for name, value in given.items() if name in grid.parameters})
    spec.parameters.update(given)
    return spec


def _yaml(text: str | None) -> object:
    """Return what a YAML text stands for. Raises ValueError for one of which MAX_SPEC bytes are not all."""
    if text is None or len(text) > MAX_SPEC:
        raise ValueError(f"it is longer than {MAX_SPEC:,} bytes")
    sizes = {}

    def size(node: yaml.Node) -> int:
        """Return how many nodes there are once every alias is written out."""
        if sizes.setdefault(node, 0) == 0:
            sizes[node] = None  # until it is known; whoever meets it meanwhile is inside of it
            children = node.value if isinstance(node.value, list) else []
            inner = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[node] = 1 + sum(size(child) for child in inner)
        if sizes[node] is None or sizes[node] > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
        return sizes[node]

    root = yaml.compose(text, yaml.SafeLoader)
    return None if root is None or not size(root) else yaml.safe_load(text)


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
    declared = {part.notebook: notebooks.declared_parameters(part.notebook) for part in parts}
    everywhere = {name for names in declared.values() for name in names}
    for name in spec.parameters:
        one_of("parameter of any notebook of the sweep", name, everywhere)
    stages, cells = {}, {}
    points = [(grid, point) for number, grid in enumerate(spec.grids, 1) for point in _points(grid, number)]
    for stage in spec.stages.values():
        if lists := [name for name, value in stage.parameters.items() if isinstance(value, list)]:
            raise InputError(f"a stage has a list for '{lists[0]}': only grids take lists")
        notebooks.checked(stage.notebook, declared[stage.notebook], stage.parameters)
        _check_choices(stage.parameters)
    for grid, point in points:
        values, needs = _values(grid, spec.parameters, point, declared), []
        for name, value in values.items():
            if isinstance(value, str) and value.startswith("@"):
                stage = _stage(spec, _filled(value[1:], values), values, declared)
                stages.setdefault(stage.name, stage)
                values[name] = stage.name
                needs.append(stage.name)
        name = f"cells/{_folder_name(grid.notebook, values)}"
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
    notebooks.checked(part.notebook, defaults, given)
    if "run_dir" in given:
        raise InputError("run_dir is the sweep's to choose: a folder for each cell below --out")
    values = {name: type(default)(given.get(name, default)) for name, default in defaults.items() if name != "run_dir"}
    for name in PATHS & values.keys():
        source = data.located(values[name])
        values[name] = str(Path(source).resolve()) if source not in data.NAMES and os.path.exists(source) else source
    return values


def _filled(text: str, values: dict) -> str:
    """Return `text` with `{name}` replaced by that parameter; not str.format, which reads attributes as well."""
    return re.sub(r"\{([^{}]*)\}", lambda match: str(values[one_of("parameter of the cell", match[1], values)]), text)


def _stage(spec: Spec, name: str, cell: dict, declared: dict) -> Cell:
    """Return the stage that a cell with these parameters names."""
    stage = spec.stages[one_of("stage", name, spec.stages)]
    for shared in stage.shares:
        one_of(f"parameter of the cells that share stage {name}", shared, cell)
    own = stage.parameters | {n: cell[n] for n in stage.shares}
    values = _values(stage, spec.parameters, own, declared)
    return Cell(f"stages/{name}-{_folder_name(stage.notebook, values)}", stage.notebook, values, seconds=stage.seconds)


def _folder_name(notebook: str, values: dict) -> str:
    """Return a folder name that a person can read, and that no other parameters have, however they are written."""
    identity = {name: value for name, value in values.items() if name not in runs.NOT_IDENTITY}
    key = hashlib.sha256(json.dumps([Path(notebook).stem, identity], sort_keys=True).encode()).hexdigest()[:8]
    shown = {name: values[name] for name in SHOWN if values.get(name, "") != ""}
    words = [str(value) if isinstance(value, str) else f"{name}{value}" for name, value in shown.items()]
    return "-".join([*(re.sub(r"[^\w.]+", "_", word)[:20] for word in words), key])


def _check_values(cells: list[Cell]) -> None:
    """Raise InputError for a value that a notebook would refuse, and for images or a label column not there."""
    for values in (cell.parameters for cell in cells):
        _check_choices(values)
        if not 0 <= values.get("noise_rate", 0) <= 1:
            raise InputError(f"noise_rate is {values['noise_rate']}; it must lie between 0 and 1")
        if values.get("init") in pretrain.METHODS and values.get("pretrain_run") == "":
            raise InputError(f"init {values['init']} needs a pretrain_run: name a stage, as '@{values['init']}'")
    for source, labels in {(c.parameters["dataset"], c.parameters.get("labels", "")) for c in cells
                           if "dataset" in c.parameters}:  # fmt: skip
        data.check_labels(source, labels)


def _check_choices(values: dict) -> None:
    for name, choices in CHOICES.items():
        for one in values.get(name, "").split(",") if name in values else []:
            one_of(name, one, choices)


def _first(error: ValidationError | TypeError) -> str:
    """Return the first complaint of pydantic in a line, with the nearest valid name."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # what it misspells is missing, too
    place = list(first["loc"][:4])
    if place[0] == "grids" and len(place) > 1:
        place[1] += 1
    where = ".".join(map(str, place))
    if "parameters" in place[:-1] and "[key]" not in first["loc"]:
        return f"{where} must be a number, a text, or true or false; in a grid, it may be a list of them"
    if first["type"] == "extra_forbidden":
        *inside, name = first["loc"]
        known = Stage if inside[:1] == ["stages"] else Part if inside[:1] == ["grids"] else Spec
        try:
            one_of("name in " + ".".join(map(str, inside or ["the sweep"])), str(name), known.model_fields)
        except InputError as unknown:
            return str(unknown)
    return f"{where}: {first['msg']}"


def _folder() -> Path:
    return notebooks.notebook_path("00_quickstart").parent / "sweeps"


def _spec_path(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    if Path(path).suffix or Path(path).name != str(path):
        raise InputError(f"no such sweep: {path}")
    return _folder() / f"{one_of('sweep', str(path), names())}.yaml"
