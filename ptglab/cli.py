"""The command line: `ptglab demo | audit | run | sweep | doctor`, thin over the notebooks.

What needs torch is imported in the commands that need it: help and mistakes should not wait for it.
"""

import importlib.metadata
import io
import json
import os
import shutil
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ptglab import __version__, files, stopping
from ptglab.errors import InputError
from ptglab.lab import notebooks
from ptglab.text import printable

PACKAGES = ["torch", "torchvision", "numpy", "scikit-learn", "papermill", "distributed", "jupyterlab", "ipywidgets",
            "umap-learn"]  # fmt: skip
option, folder = click.option, click.Path(path_type=Path)
parameters_option = option(
    "-p", "--parameter", multiple=True, metavar="NAME=VALUE", help="A notebook parameter; repeatable."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Learn from wrongly labelled images without any clean subset, and find the wrong labels."""


@cli.command(epilog="Example: ptglab demo --out runs/demo60 -p noise_rate=0.6")
@option("--out", type=folder, default="runs/demo", show_default=True, help="The run folder; what is finished there is "
        "not run again.")  # fmt: skip
@parameters_option
def demo(out: Path, parameter: tuple[str, ...]) -> None:
    """Run the whole story on the embedded digits, in about eight minutes of one CPU core.

    Pre-trains without labels, fine-tunes on wrong ones, finds them; leaves figures, results and the notebook.
    """
    values = notebooks.values("00_quickstart", [*parameter, f"run_dir={out}"])
    notebooks.execute("00_quickstart", out / "notebook.ipynb", values)
    _print_results(out)
    print(f"\nfigures   {out / 'figures'}\nnotebook  {out / 'notebook.ipynb'}\nresults   {out / 'results.csv'}")


@cli.command(
    epilog="Examples: ptglab audit photos/  |  ptglab audit photos/ --budget standard --flag rate  |  "
    "ptglab audit train.parquet --labels label_worse --out runs/worse  |  ptglab audit photos/ --start dinov2"
)
@click.argument("source")
@option("--out", type=folder, help="The run folder.  [default: runs/audit/NAME]")
@option("--split", default="", metavar="NAME", help="train, val, test, or all of them.  [default: train]")
@option("--table", default="", metavar="FILE", help="The table of labels, if it is not the only one beside the images.")
@option("--id-column", default="", metavar="COLUMN", help="The column of that table that names the images.")
@option("--labels", "--label-column", "labels", default="", metavar="COLUMN",
        help="The column of given labels in a table or parquet file.")  # fmt: skip
@option("--budget", default="quick", show_default=True, metavar="quick|standard|thorough",
        help="quick: minutes on two cores; standard: longer; thorough: fine-tuned folds, for a GPU.")  # fmt: skip
@option("--image-size", type=int, default=0, metavar="PIXELS",
        help="Resize to this square.  [default: by the images, 32 to the budget's largest]")  # fmt: skip
@option("--flip/--no-flip", default=True, show_default=True,
        help="Whether mirrored images mean the same; not so for digits, letters, left and right.")  # fmt: skip
@option("--start", default="auto", show_default=True, metavar="START",
        help="What describes the images: patches, lite0, dinov2, timm:NAME, scratch, imagenet, a file or folder of "
        "weights, or several joined by +; auto: patches, lite0 or both, as explains the labels best.")  # fmt: skip
@option("--detector", default="", help="The detector that decides.  [default: the notebook's]")
@option("--flag", default="own", show_default=True, metavar="own|rate|NUMBER",
        help="Flag by the detector's own threshold, by the estimated rate, or this many labels.")  # fmt: skip
@option("--precision", type=float, default=0.0, metavar="P",
        help="Flag as many as are expected to be wrong with this probability, such as 0.8.")  # fmt: skip
@option("--update", is_flag=True, help="Images have come, gone or changed: keep what is known of the others.")
@option("--seed", type=int, default=0, show_default=True)
@option("--device", default="auto", show_default=True)
@parameters_option
def audit(source: str, out: Path | None, parameter: tuple[str, ...], **options) -> None:
    """Rank the labels of SOURCE, the most suspicious first, with pictures and files for labelling tools.

    SOURCE is a folder with one sub-folder a class, a folder with a table id,label, parquet, or a name such as cifar10.
    Leaves suspects.csv, gallery.html, report.ipynb and more; run again, it goes on where it was.
    """
    from ptglab import data
    from ptglab.audit import stages

    out = out or Path("runs", "audit", Path(os.path.realpath(source)).stem)
    given = [f"{name}={value}" for name, value in options.items() if value != ""]
    values = notebooks.values(stages.NOTEBOOK, [f"dataset={source}", f"run_dir={out}", *given, *parameter])
    chosen = notebooks.declared_parameters(stages.NOTEBOOK) | values
    stages.plan(*(chosen[name] for name in ("budget", "detector", "flag", "precision")))  # before a kernel starts
    data.check_labels(*(chosen[name] for name in ("dataset", "labels", "split", "table", "id_column")))
    with stages.refusal_leaves_nothing(out):
        notebooks.execute(stages.NOTEBOOK, out / "report.ipynb", values)
    _print_summary(out)


@cli.command(epilog="Example: ptglab run 02_pretrain out.ipynb -p method=barlow_twins -p epochs=60")
@click.argument("notebook")
@click.argument("out", type=folder)
@parameters_option
def run(notebook: str, out: Path, parameter: tuple[str, ...]) -> None:
    """Execute NOTEBOOK (one of ours, as 02_pretrain, or a path) into OUT.

    Parameters are checked before anything starts: an unknown name, or a value of another type, is an error.
    """
    notebooks.execute(notebook, out, notebooks.values(notebook, parameter))
    print(printable(out))


@cli.command(
    epilog="Examples: ptglab sweep smoke  |  ptglab sweep digits --jobs 2 --dry-run  |  "
    "ptglab sweep my.yaml --out runs/mine -p dataset=photos/  |  ptglab sweep cifar10n --dask tcp://head:8786"
)
@click.argument("spec")
@option("--out", type=folder, help="Where all of it goes.  [default: runs/NAME]")
@option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="How many cells at a time.")
@option("--dask", default="", metavar="ADDRESS", help="Run on the Dask cluster whose scheduler is there, or in this "
        "file; a cell takes a GPU=1 where workers declare some.")  # fmt: skip
@option("--dry-run", is_flag=True, help="Print the cells, what they share and how long it will take; run nothing.")
@option("-p", "--parameter", multiple=True, metavar="NAME=VALUE",
        help="In the place of the sweep's and its grids'; stages keep theirs. Repeatable.")  # fmt: skip
def sweep(spec: str, out: Path | None, jobs: int, dask: str, dry_run: bool, parameter: tuple[str, ...]) -> None:
    """Run the grid of notebook executions that SPEC describes: a YAML file, or one of ours by name.

    Finished cells are not run again, interrupted ones go on where they were. The exit status is the number of cells
    that failed, 100 at most; what SPEC gets wrong is said before any cell runs, with status 2.
    """
    from ptglab.lab import board, sweeps
    from ptglab.lab import spec as specs

    if dask and jobs > 1:
        raise InputError("--jobs is of this machine: on a cluster, its workers say how many cells run at a time")
    texts = [text.partition("=") for text in parameter]
    if bad := [name for name, equals, _ in texts if not equals]:
        raise InputError(f"'{bad[0]}' is no parameter: write it as NAME=VALUE")
    read = specs.read(spec, {name: value for name, _, value in texts})
    cells, out = specs.plan(read), out or Path("runs", Path(spec).stem)
    if dry_run:
        board.plan(read.title, cells, out, jobs)
        return
    failed = board.watch(read.title, sweeps.run(cells, out, jobs, dask), cells, out, jobs)
    print(f"\nresults   {printable(out / 'results.csv')}\ncells     {printable(out / 'cells')}")
    sys.exit(min(100, failed))


@cli.command()
def doctor() -> None:
    """Print versions, device, data root, and what is missing."""
    from ptglab import data
    from ptglab.lab import runs
    from ptglab.train import engine

    table, problems = Table(box=None, show_header=False, pad_edge=False), []
    table.add_row("ptglab", f"{__version__} {runs.commit()}".strip())
    table.add_row("python", f"{sys.version.split()[0]} ({sys.executable})")
    for name in PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "[bold]missing[/]")
            problems.append(f"{name}: pip install 'ptglab[lab]'")
    place = engine.place()
    table.add_row("device", f"{runs.hardware(place.device)}, {place.precision}")
    table.add_row("notebooks", ", ".join(notebooks.notebook_names()))
    try:
        root = data.root()
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        holds = f"holds {', '.join(found[:8])}" if found else "is empty or not there; digits need nothing"
        table.add_row("data root", safe(f"{root.resolve()} {holds}"))
    except InputError as error:
        problems.append(str(error))
    table.add_row("free disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GB here")
    Console().print(table)
    print("\n".join(f"missing: {printable(problem)}" for problem in problems) or "nothing is missing")


def safe(text: object) -> str:
    """Return `text` as rich shows it: no part of it is markup, or a command to the terminal."""
    return escape(printable(text))


def _print_results(out: Path) -> None:
    """Print the results as a table, mean and standard deviation over noise seeds, and where the gain comes from."""
    from ptglab.lab import runs, tables

    frame = runs.Run(out).results()
    table = Table(title=f"{safe(frame['noise'][0])} noise, nominal {frame['noise_rate'][0]:.0%}, "
                        f"effective {frame['effective_rate'].mean():.1%}; {frame['seed'].nunique()} noise seeds; "
                        f"{frame['n_train'][0]:,} images; percent, mean ± sample standard deviation")  # fmt: skip
    measures = ("accuracy_last", "accuracy_best", "accuracy_selected", "f1", "balanced_accuracy")
    for heading in ("start", "mode", "last", "best (oracle)", "selected", "detector", "F1", "balanced"):
        table.add_column(heading, justify="left" if heading in ("start", "mode", "detector") else "right", no_wrap=True)
    for (init, mode), group in frame.groupby(["init", "mode"], sort=False):
        for row, (detector, rows) in enumerate(group.groupby("detector", sort=False)):
            cells = [f"{100 * rows[m].mean():.1f} ± {100 * rows[m].std():.1f}" for m in measures]
            first = [safe(init), safe(mode), *cells[:3]] if row == 0 else [""] * 5
            table.add_row(*first, safe(detector), *cells[3:])
    Console(width=max(118, Console().width)).print(table)
    gains = tables.decompose(tables.experiments(tables.arms(frame)), "accuracy_last")
    print("\n".join(f"at the last epoch, {said}" for said in gains["said"]))


def _print_summary(out: Path) -> None:
    """Print what an audit found, where the report is, and what to do with it."""
    from ptglab.audit import exports

    summary, console = json.loads((out / "summary.json").read_text()), Console()
    first, *others = exports.in_words(summary)
    console.print(f"\n[bold]{first}[/]", *others, sep="\n", highlight=False)
    table = Table("given", "suggested", "labels", title="most frequent", title_justify="left", box=None)
    for given, suggested, number in summary["confusions"][:5]:
        table.add_row(Text(given), Text(suggested), f"{number:,}")
    console.print(table)
    took = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    lines = {"images": summary["notes"][-1], "looked at": f"by {summary['start']}", "seconds": took,
             "look at": out / "gallery.html", "read": out / "report.ipynb",
             "work with": f"{out / 'suspects.csv'}, label_studio.json, fiftyone.csv, duplicates.csv, outliers.csv",
             "review": summary["next"]["review"], "note": summary["better"]}  # fmt: skip
    for name, line in lines.items():
        print(f"{name:<10}{printable(str(line))}" if line else "", end="\n" if line else "")


class _Output(io.FileIO):
    """Standard output of which any part may be read, as by `ptglab doctor | head -1`: the rest goes nowhere."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


def main() -> None:
    """Run the command line; a mistake is one line on stderr and exit status 2, an interruption one line and 130."""
    stopping.catch()
    if sys.stdout and sys.stdout is sys.__stdout__ and not sys.stdout.isatty():
        output = io.BufferedWriter(_Output(sys.stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(output, sys.stdout.encoding, sys.stdout.errors)
    try:
        with files.writing("here"):
            cli(prog_name="ptglab", standalone_mode=False)
    except (InputError, click.ClickException) as error:
        lines = error.format_message().split("\n") if isinstance(error, click.ClickException) else [error]
        print("ptglab:", "\n".join(map(printable, lines)), file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print(f"ptglab: {stopping.LINE}", file=sys.stderr)
        sys.exit(stopping.STATUS)
