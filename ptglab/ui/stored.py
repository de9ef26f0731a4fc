"""What a sweep has stored, one choice of start and noise at a time; what is missing is computed as a sweep's cells."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from ptglab.audit import reopen
from ptglab.data import noise
from ptglab.errors import InputError, one_of
from ptglab.lab import notebooks, runs, spec, sweeps, tables

CHOSEN = ("init", "noise_kind", "noise_rate")  # parameters of an experiment that are chosen here
KINDS = [kind for kind in noise.KINDS if kind not in ("none", "transition", "human")]
RATES = (0.2, 0.4, 0.6, 0.8)


class Stored:
    """The cells of a sweep below `out`, and those beside them that differ only in kind and rate of the noise.

    A choice is an `init`, a `noise_kind` and a `noise_rate`; everything else is the sweep's: of the first grid that
    has this init, the first of each list. `choices` has the values of each to choose from. Raises InputError for a
    sweep without experiments, or on human labels.
    """

    def __init__(self, plan: spec.Spec, out: str | Path):
        self.spec, self.out = plan, Path(out).resolve()
        self._cells: dict[tuple, list[spec.Cell]] = {}
        grids = [g for g in plan.grids if set(CHOSEN) <= notebooks.declared_parameters(g.notebook).keys()]
        if not grids:
            raise InputError(f"the sweep '{plan.title}' has no grid of an experiment: nothing to choose")
        if any(grid.parameters.get("labels", plan.parameters.get("labels")) for grid in grids):
            raise InputError(f"the sweep '{plan.title}' is of labels that people gave: there is no noise to choose")
        values = {name: [(v, grid) for grid in grids for v in _values(grid, name)] for name in CHOSEN}
        self._grids = dict(reversed(values["init"]))  # of each init, the first grid that has it
        kinds = [kind for kind, _ in values["noise_kind"] if kind in KINDS]
        self.choices = {
            "noise_rate": sorted({*RATES, *(float(rate) for rate, _ in values["noise_rate"])}),
            "noise_kind": list(dict.fromkeys([*kinds, *KINDS])),
            "init": list(dict.fromkeys(init for init, _ in values["init"])),
        }

    def cells(self, init: str, noise_kind: str, noise_rate: float) -> list[spec.Cell]:
        """Return the cells of a choice, what the experiment needs first. Raises InputError for an unknown init."""
        key = init, noise_kind, float(noise_rate)
        if key not in self._cells:
            grid = self._grids[one_of("init of the sweep", init, self.choices["init"])]
            own = {name: _values(grid, name)[0] for name in grid.parameters} | dict(zip(CHOSEN, key, strict=True))
            parts = [grid, *self.spec.stages.values()]
            known = {name for part in parts for name in notebooks.declared_parameters(part.notebook)}
            common = {name: value for name, value in self.spec.parameters.items() if name in known}
            one = grid.model_copy(update={"parameters": own})
            self._cells[key] = spec.plan(self.spec.model_copy(update={"parameters": common, "grids": [one]}))
        return self._cells[key]

    def missing(self, **choice) -> list[spec.Cell]:
        """Return the cells of a choice that have not finished."""
        return [cell for cell in self.cells(**choice) if not cell.finished(self.out)]

    def seconds(self, **choice) -> float:
        """Return how long the missing cells will take, NaN if that is unknown."""
        return sweeps.estimate(self.cells(**choice), self.out, 1)

    def compute(self, *choices: dict, jobs: int = 1) -> Iterator[tuple[int, int, sweeps.Event]]:
        """Execute the missing cells of the choices; yield (finished, of how many, event).

        The tables of the whole sweep stay the sweep's. Raises InputError if a cell failed, or another sweep is running.
        """
        cells = list({cell.name: cell for choice in choices for cell in self.missing(**choice)}.values())
        done = 0
        for event in sweeps.run(cells, self.out, jobs, gathered=spec.plan(self.spec)) if cells else ():
            done += event.state == "finished"
            if event.state in ("failed", "blocked"):
                raise InputError(f"{event.cell.name}: {event.error}; see {self.out / event.cell.name / 'log.txt'}")
            yield done, len(cells), event

    def folder(self, **choice) -> Path:
        """Return the folder of the experiment of a choice."""
        return self.out / self.cells(**choice)[-1].name

    def read(self, **choice) -> reopen.Findings:
        """Return what the experiment of a choice found. Raises InputError if it is missing."""
        return reopen.read(self.folder(**choice))

    def curves(self, **choice) -> pd.DataFrame | None:
        """Return epoch, accuracy_test, learned_right and learned_wrong of a choice; None if it is missing."""
        path = self.folder(**choice) / "curves.csv"
        return pd.read_csv(path) if not self.missing(**choice) and path.exists() else None

    def results(self) -> pd.DataFrame:
        """Return one row for each experiment that has finished below `out`, with its `arm`; see tables.arms."""
        found = [path.parent for path in sorted(self.out.glob("cells/*/notebook.ipynb"))]
        rows = [runs.Run(folder).results() for folder in found if (folder / "results.csv").exists()]
        if not rows:
            return pd.DataFrame()
        whole = pd.concat([table.dropna(axis=1, how="all") for table in rows], ignore_index=True)
        whole = whole.reindex(columns=runs.RESULT_COLUMNS).astype({"labels": "object"})
        return tables.experiments(tables.arms(whole))


def _values(grid: spec.Part, name: str) -> list:
    """Return the values that a grid gives a parameter, or its notebook's default, as a list."""
    value = grid.parameters.get(name, notebooks.declared_parameters(grid.notebook)[name])
    return value if isinstance(value, list) else [value]
