"""What a sweep is: a YAML file that is checked whole, and the cells it stands for."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ptglab import files
from ptglab.errors import InputError, one_of
from ptglab.lab import notebooks
from ptglab.text import printable

MAX_SPEC, MAX_NODES = 1 << 20, 100_000  # bytes of a sweep's file, and values in it with every alias written out
MAX_CELLS = 10_000  # of a sweep
MARK = "finished.json"  # what a finished cell left: the bytes of its notebook, and a hash of each of TABLES
TABLES = ("results.csv", "curves.csv")  # what is gathered from the cells, where they leave it
Value = bool | int | float | str
PATHS = {"dataset", "source", "weights"}  # parameters that may name a file; a cell has a folder of its own
SHOWN = ("init", "method", "mode", "recipe", "noise_kind", "noise_rate", "labels", "seed")  # in the name of a folder
UNREADABLE = (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError)


class Part(BaseModel):
    """What stages and grids have in common; parameters are those of its notebook."""

    model_config = ConfigDict(extra="forbid", strict=True)
    notebook: str
    parameters: dict[str, Value | Annotated[list[Value], Field(min_length=1)]] = {}
    seconds: float = 0.0  # how long one run took when last measured; for the estimate of time


class Stage(Part):
    """A run that cells share and refer to by `@` and its name; `shares` are the cells' parameters it depends on."""

    parameters: dict[str, Value] = {}
    shares: list[str] = ["seed"]


class Spec(BaseModel):
    """A sweep. `parameters` go to every notebook that declares them; each grid is the product of its lists."""

    model_config = ConfigDict(extra="forbid", strict=True)
    title: str
    parameters: dict[str, Value] = {}
    stages: dict[str, Stage] = {}
    grids: list[Part] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One execution of a notebook: `name` is its folder below the sweep's, `needs` the cells that come first."""

    name: str
    notebook: str
    parameters: dict[str, Value]
    needs: tuple[str, ...] = ()
    seconds: float = 0.0

    def finished(self, out: Path) -> bool:
        """Return whether the cell has finished below `out`, and all that it left there is as it was."""
        folder = out / self.name
        try:
            return files.read_json(folder / MARK) == left(folder)
        except (OSError, ValueError):
            return False


def left(folder: Path) -> dict[str, int | str]:
    """Return what a finished cell left in its folder, as MARK has it. Raises InputError if there is no notebook."""
    there = [name for name in TABLES if os.path.lexists(folder / name)]
    tables = {name: hashlib.sha256(files.read(folder / name)).hexdigest() for name in there}
    with suppress(OSError):
        if size := (folder / "notebook.ipynb").stat().st_size:
            return {"notebook.ipynb": size} | tables
    raise InputError(f"{folder / 'notebook.ipynb'} is missing or empty")


def read(path: str | Path, overrides: dict[str, str] | None = None) -> Spec:
    """Return the spec at `path`, a YAML file or the name of one of ours.

    `overrides` are texts, read as YAML, that replace its parameters and its grids'. Raises InputError, in one line,
    for anything that is not a spec.
    """
    if not Path(path).is_file():
        if Path(path).suffix or Path(path).name != str(path):
            raise InputError(f"no such sweep: {path}")
        path = _folder() / f"{one_of('sweep', str(path), names())}.yaml"
    what = str(path)
    try:
        with open(path, encoding="utf-8") as file:
            found = _yaml(file.read(MAX_SPEC + 1))
        what = "a parameter"
        given = {name: _yaml(text) for name, text in (overrides or {}).items()}
    except UNREADABLE as error:
        raise InputError(f"{what} cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no sweep: it must hold title, parameters, stages and grids")
    try:
        spec = Spec.model_validate(found)
        for grid in spec.grids:
            grid.parameters.update({name: value for name, value in given.items() if name in grid.parameters})
        spec = Spec.model_validate(spec.model_dump(warnings=False))
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}") from None
    spec.parameters.update(given)  # a list is of the grids that have the parameter; `plan` refuses it elsewhere
    return spec


def _yaml(text: str) -> object:
    """Return what a YAML text stands for. Raises ValueError if it is too long, or its aliases multiply."""
    if len(text) > MAX_SPEC:
        raise ValueError(f"it is longer than {MAX_SPEC:,} characters")
    sizes = {}

    def size(node: yaml.Node) -> int:
        """Return how many nodes there are once every alias is written out."""
        if node not in sizes:
            sizes[node] = MAX_NODES + 1  # until it is known: a node inside itself has no end
            children = node.value if isinstance(node.value, list) else []
            pairs = (child if isinstance(child, tuple) else (child,) for child in children)
            sizes[node] = 1 + sum(size(inner) for pair in pairs for inner in pair)
        if sizes[node] > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
        return sizes[node]

    if (root := yaml.compose(text, yaml.SafeLoader)) is not None:
        size(root)
    return yaml.safe_load(text)


def names() -> list[str]:
    """Return the names of our sweeps."""
    return [path.stem for path in sorted(_folder().glob("*.yaml"))]


def published():
    """Return a DataFrame of the figures that others published, one a row, with their source.

    `paper`: the authors' tables of arXiv 2511.20844, n = 5; `summary`: a summary of it, whose figures are not in them.
    """
    return files.read_csv(_folder() / "published.csv")


def plan(spec: Spec) -> list[Cell]:
    """Return every cell of `spec`, stages before the cells that share them, all checked.

    Raises InputError for a notebook, parameter, stage, value or label column that does not exist, a value of another
    type, and a cell that occurs twice.
    """
    parts = [*spec.stages.values(), *spec.grids]
    declared = {part.notebook: notebooks.declared_parameters(part.notebook) for part in parts}
    everywhere = {name for names in declared.values() for name in names}
    for name in spec.parameters:
        one_of("parameter of any notebook of the sweep", name, everywhere)
    for name in spec.stages:
        if not re.fullmatch(r"\w[\w.-]{0,60}", name):
            raise InputError(f"stage '{printable(name)[:80]}': its name may have letters, digits, '.', '-' and '_'")
    if (count := sum(_number_of_points(grid) for grid in spec.grids)) > MAX_CELLS:
        raise InputError(f"the sweep stands for {count:,} cells, more than the {MAX_CELLS:,} that one may have")
    for stage in spec.stages.values():
        notebooks.checked(stage.notebook, declared[stage.notebook], stage.parameters)
    stages, cells = {}, {}
    points = [(grid, point) for grid in spec.grids for point in _points(grid)]
    for grid, point in points:
        values, needs = _values(grid, spec.parameters, point, declared), []
        for name, value in values.items():
            if isinstance(value, str) and value.startswith("@"):
                stage = _stage(spec, value[1:], values, declared)
                stages.setdefault(stage.name, stage)
                values[name] = stage.name
                needs.append(stage.name)
        name = f"cells/{_folder_name(grid.notebook, values)}"
        if name in cells:
            raise InputError(f"two cells of the sweep are the same, and would share the folder {name}")
        cells[name] = Cell(name, grid.notebook, values, tuple(needs), grid.seconds)
    planned = [*stages.values(), *cells.values()]
    _check([*(stage.parameters for stage in spec.stages.values()), *(cell.parameters for cell in planned)])
    return planned


def _points(grid: Part) -> Iterator[dict[str, Value]]:
    """Yield the parameters of every cell of a grid; the last list varies fastest."""
    lists = [value if isinstance(value, list) else [value] for value in grid.parameters.values()]
    return (dict(zip(grid.parameters, values, strict=True)) for values in product(*lists))


def _number_of_points(grid: Part) -> int:
    return math.prod(len(value) for value in grid.parameters.values() if isinstance(value, list))


def _values(part: Part, common: dict, own: dict, declared: dict) -> dict[str, Value]:
    """Return all parameters of a notebook but run_dir: its defaults, then the sweep's, then its own; checked."""
    from ptglab import data

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


def _stage(spec: Spec, reference: str, cell: dict, declared: dict) -> Cell:
    """Return the stage that a cell with the parameters `cell` refers to, by a name in which `{NAME}` is one of them."""

    def own(name: str, what: str = "parameter of the cell") -> Value:
        return cell[one_of(what, name, cell)]

    # not str.format, which reads attributes as well
    name = one_of("stage", re.sub(r"\{([^{}]*)\}", lambda match: str(own(match[1])), reference), spec.stages)
    stage = spec.stages[name]
    shared = {each: own(each, f"parameter of the cells that share stage {name}") for each in stage.shares}
    values = _values(stage, spec.parameters, stage.parameters | shared, declared)
    return Cell(f"stages/{name}-{_folder_name(stage.notebook, values)}", stage.notebook, values, seconds=stage.seconds)


def _folder_name(notebook: str, values: dict) -> str:
    """Return a readable folder name that no other parameters have, however they are written."""
    identity = {name: value for name, value in values.items() if name not in notebooks.NOT_IDENTITY}
    key = hashlib.sha256(json.dumps([Path(notebook).stem, identity], sort_keys=True).encode()).hexdigest()[:8]
    shown = {name: values[name] for name in SHOWN if values.get(name, "") != ""}
    words = [str(value) if isinstance(value, str) else f"{name}{value}" for name, value in shown.items()]
    return "-".join([*(re.sub(r"[^\w.]+", "_", word)[:20] for word in words), key])


def _check(parameters: list[dict]) -> None:
    """Raise InputError for values that a notebook would refuse at its start, and for missing images or columns."""
    from ptglab import data
    from ptglab.data import noise
    from ptglab.detect import cleaning, label_errors
    from ptglab.train import backbones, controls, finetune, pretrain

    choices = {
        "method": pretrain.METHODS, "mode": finetune.MODES, "recipe": cleaning.RECIPES, "noise_kind": noise.KINDS,
        "backbone": backbones.BACKBONES, "schedule": pretrain.SCHEDULES, "detectors": label_errors.DETECTORS,
    }  # fmt: skip
    for values in parameters:
        for name in choices.keys() & values.keys():
            for one in values[name].split(","):  # detectors are a list
                one_of(name, one, choices[name])
        if {"method", "schedule"} <= values.keys():
            changes = {name: values[name] for name in pretrain.CHANGES if name in values}
            pretrain.recipe(values["method"], values["schedule"], **changes)
        if not 0 <= values.get("noise_rate", 0) <= 1:
            raise InputError(f"noise_rate is {values['noise_rate']}; it must lie between 0 and 1")
        if values.get("init") in pretrain.METHODS and values.get("pretrain_run") == "":
            raise InputError(f"init {values['init']} needs a pretrain_run: name a stage, as '@{values['init']}'")
        if controls.known(values.get("init", "")) and values.get("mode", "linear") != "linear":
            raise InputError(f"init {values['init']} is frozen: its mode is linear, not {values['mode']}")
    for source, labels in {(v["dataset"], v.get("labels", "")) for v in parameters if "dataset" in v}:
        data.check_labels(source, labels)


def _first(error: ValidationError) -> str:
    """Return the first complaint of pydantic in a line, with the nearest valid name."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a misspelt name is also missing
    *inside, name = place = [i + 1 if n == 1 and isinstance(i, int) else i for n, i in enumerate(first["loc"][:4])]
    where = ".".join(map(str, place))
    if "parameters" in inside and "[key]" not in first["loc"]:
        where = ".".join(map(str, place[: place.index("parameters") + 2]))
        return f"{where} must be a number, a text, or true or false; in a grid, also a list of one or more"
    if first["type"] == "extra_forbidden":
        known = {"stages": Stage, "grids": Part}.get(place[0] if inside else "", Spec).model_fields
        try:
            one_of(f"name in {'.'.join(map(str, inside)) or 'the sweep'}", str(name), known)
        except InputError as unknown:
            return str(unknown)
    return f"{where}: {first['msg']}"


def _folder() -> Path:
    return notebooks.notebook_path("00_quickstart").parent / "sweeps"
