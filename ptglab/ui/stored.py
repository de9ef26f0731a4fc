"""What a sweep has stored, one choice at a time; what is missing is computed by the sweep's own means."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from ptglab.audit import reopen
from ptglab.audit.reopen import Findings
from ptglab.data import noise
from ptglab.errors import InputError, one_of
from ptglab.lab import notebooks, runs, spec, tables
from ptglab.lab import sweeps as sweep

NEEDED = ("init", "noise_kind", "noise_rate")  # parameters of an experiment that are chosen here
KINDS = [kind for kind in noise.KINDS if kind not in ("none", "transition", "human")]
RATES = (0.2, 0.4, 0.6, 0.8)


class Stored:
    """The cells of a sweep below `out`, and those beside them that differ in kind and rate of the noise only.

    A choice is an `init`, a `noise_kind` and a `noise_rate`, everything else is the sweep's: of the first grid that
    has this init, the first of each list. Raises InputError for a sweep with no experiments, or on human labels.
    """

    def __init__(self, plan: spec.Spec, out: str | Path):
        self.spec, self.out = plan, Path(out).resolve()
        self._cells: dict[tuple, list[spec.Cell]] = {}
        self._rows: dict[Path, pd.DataFrame] = {}
        parts = [g for g in plan.grids if set(NEEDED) <= notebooks.declared_parameters(g.notebook).keys()]
        if not parts:
            raise InputError(f"the sweep '{plan.title}' has no grid of an experiment: nothing to choose")
        if any(part.parameters.get("labels", plan.parameters.get("labels")) for part in parts):
            raise InputError(f"the sweep '{plan.title}' is of labels that people gave: there is no noise to choose")
        self._grids: dict[str, spec.Part] = {}
        for part in parts:
            for init in _several(part.parameters.get("init", notebooks.declared_parameters(part.notebook)["init"])):
                self._grids.setdefault(init, part)
        self.inits = list(self._grids)
        listed = [part.parameters.get("noise_kind", "uniform") for part in parts]
        kinds = dict.fromkeys(kind for one in listed for kind in _several(one))
        self.kinds = [*(k for k in kinds if k in KINDS), *(k for k in KINDS if k not in kinds)]
        rates = [rate for part in parts for rate in _several(part.parameters.get("noise_rate", 0.4))]
        self.rates = sorted({*RATES, *map(float, rates)})

    def cells(self, init: str, noise_kind: str, noise_rate: float) -> list[spec.Cell]:
        """Return the cells of a choice, what the last one needs before it. Raises InputError for a choice not there."""
        key = init, noise_kind, float(noise_rate)
        if key not in self._cells:
            part = self._grids[one_of("init of the sweep", init, self._grids)]
            own = {name: _several(value)[0] for name, value in part.parameters.items()}
            own |= dict(zip(NEEDED, key, strict=True))
            parts = [part, *self.spec.stages.values()]
            known = {name for each in parts for name in notebooks.declared_parameters(each.notebook)}
            common = {name: value for name, value in self.spec.parameters.items() if name in known}
            grid = part.model_copy(update={"parameters": own})
            self._cells[key] = spec.plan(self.spec.model_copy(update={"parameters": common, "grids": [grid]}))
        return self._cells[key]

    def missing(self, **choice) -> list[spec.Cell]:
        """Return those of the cells of a choice that have not finished."""
        return [cell for cell in self.cells(**choice) if not cell.finished(self.out)]

    def seconds(self, **choice) -> float:
        """Return how long the missing cells will take, NaN if nobody knows."""
        return sweep.estimate(self.cells(**choice), self.out, 1)

    def compute(self, *choices: dict, jobs: int = 1) -> Iterator[tuple[int, int, sweep.Event]]:
        """Execute what is missing of the choices; yield (finished, of how many, what became of a cell).

        The tables of the whole sweep stay the sweep's. Raises InputError if a cell failed, or a sweep is at work there.
        """
        cells = list({cell.name: cell for choice in choices for cell in self.missing(**choice)}.values())
        done = 0
        for event in sweep.run(cells, self.out, jobs, gathered=spec.plan(self.spec)) if cells else ():
            done += event.state == "finished"
            if event.state in ("failed", "blocked"):
                raise InputError(f"{event.cell.name}: {event.error}; see {self.out / event.cell.name / 'log.txt'}")
            yield done, len(cells), event

    def read(self, **choice) -> Findings:
        """Return what the experiment of a choice found. Raises InputError if it is missing."""
        return reopen.read(self.folder(**choice))

    def curves(self, **choice) -> pd.DataFrame | None:
        """Return epoch, accuracy_test, learned_right and learned_wrong of a choice; None if it is missing."""
        path = self.folder(**choice) / "curves.csv"
        return pd.read_csv(path) if not self.missing(**choice) and path.exists() else None

    def folder(self, **choice) -> Path:
        """Return the folder of the experiment of a choice."""
        return self.out / self.cells(**choice)[-1].name

    def results(self) -> pd.DataFrame:
        """Return one row an experiment that finished below `out`, with its `arm`; see tables.arms."""
        paths = [p.with_name("results.csv") for p in sorted(self.out.glob("cells/*/notebook.ipynb"))]
        for path in (p for p in paths if p not in self._rows and p.exists()):
            self._rows[path] = pd.read_csv(path, dtype={"commit": str})
        frames = [self._rows[path].dropna(axis=1, how="all") for path in paths if path in self._rows]
        if not frames:
            return pd.DataFrame()
        whole = pd.concat(frames, ignore_index=True).reindex(columns=runs.RESULT_COLUMNS)
        return tables.experiments(tables.arms(whole.astype({"labels": "object"})))


def _several(value) -> list:
    return value if isinstance(value, list) else [value]
