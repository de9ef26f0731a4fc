"""The command line: `ptglab demo | audit | run | doctor`, thin over the notebooks."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptglab import __version__, data, engine, runs
from ptglab import audit as audits
from ptglab.errors import InputError

parameters_option = click.option(
    "-p", "--parameter", multiple=True, metavar="NAME=VALUE", help="A notebook parameter; repeatable."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Learn from wrongly labelled images without any clean subset, and find the wrong labels."""


@cli.command(epilog="Example: ptglab demo --out runs/demo60 -p noise_rate=0.6")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="runs/demo",
    show_default=True,
    help="The run folder; what is finished there is not run again.",
)
@parameters_option
def demo(out: Path, parameter: tuple[str, ...]) -> None:
    """Run the whole story on the embedded digits, in about four minutes.

    Pre-trains without labels, fine-tunes on wrong ones, finds them; leaves figures, results and the notebook.
    """
    values = _values("00_quickstart", [*parameter, f"run_dir={out}"])
    _execute("00_quickstart", out / "notebook.ipynb", values)
    _print_summary(runs.Run(out))
    print(f"\nfigures   {out / 'figures'}\nnotebook  {out / 'notebook.ipynb'}\nresults   {out / 'results.csv'}")


@cli.command(
    epilog="Examples: ptglab audit photos/  |  ptglab audit photos/ --budget standard --flag rate  |  "
    "ptglab audit train.parquet --labels label_worse --out runs/worse"
)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder.  [default: runs/audit/NAME]")
@click.option("--labels", default="", metavar="COLUMN", help="The column of given labels in a CSV or parquet file.")
@click.option("--budget", type=click.Choice(list(audits.BUDGETS)), default="quick", show_default=True,
              help="quick: minutes on two cores; standard: longer; thorough: fine-tuned folds, for a GPU.")  # fmt: skip
@click.option("--image-size", type=int, default=0, metavar="PIXELS",
              help="Resize to this square.  [default: by the images, 32 to the budget's largest]")  # fmt: skip
@click.option("--flip/--no-flip", default=True, show_default=True,
              help="Whether mirrored images mean the same; not so for digits, letters, left and right.")  # fmt: skip
@click.option("--start", default="auto", show_default=True, metavar="START",
              help="scratch, imagenet, a file of weights; auto: imagenet if it can be had.")  # fmt: skip
@click.option("--detector", default="", help="The detector that decides.  [default: the notebook's]")
@click.option("--flag", default="own", show_default=True, metavar="own|rate|NUMBER",
              help="Flag by the detector's own threshold, by the estimated rate, or this many labels.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@parameters_option
def audit(source: str, out: Path | None, parameter: tuple[str, ...], **options) -> None:
    """Rank the labels of SOURCE, the most suspicious first, with pictures and files for labelling tools.

    SOURCE is a folder with one sub-folder a class, a folder with a CSV id,label, parquet, or a name such as cifar10.
    Leaves suspects.csv, gallery.html, report.ipynb and more; run again, it goes on where it was.
    """
    data.splits(source)  # what is not there is refused before a kernel starts
    out = out or Path("runs", "audit", Path(source).resolve().stem)
    given = [f"{name}={value}" for name, value in options.items() if value != ""]
    values = _values("06_audit_your_images", [f"dataset={source}", f"run_dir={out}", *given, *parameter])
    was_there = out.exists()
    try:
        _execute("06_audit_your_images", out / "report.ipynb", values)
    except InputError:
        if not was_there and not (out / "pretrain").exists():  # refused before any work was done
            shutil.rmtree(out, ignore_errors=True)
        raise
    _print_audit(runs.Run(out))


@cli.command(epilog="Example: ptglab run 02_pretrain out.ipynb -p method=barlow_twins -p epochs=60")
@click.argument("notebook")
@click.argument("out", type=click.Path(path_type=Path))
@parameters_option
def run(notebook: str, out: Path, parameter: tuple[str, ...]) -> None:
    """Execute NOTEBOOK (one of ours, as 02_pretrain, or a path) into OUT.

    Parameters are checked before anything starts: an unknown name, or a value of another type, is an error.
    """
    _execute(notebook, out, _values(notebook, parameter))
    print(out)


@cli.command()
def doctor() -> None:
    """Print versions, device, data root, and what is missing."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("ptglab", f"{__version__} {runs.commit()}".strip())
    table.add_row("python", f"{sys.version.split()[0]} ({sys.executable})")
    missing = []
    for name in (
        "torch",
        "torchvision",
        "numpy",
        "scikit-learn",
        "papermill",
        "jupyterlab",
        "ipywidgets",
        "umap-learn",
    ):
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "[bold]missing[/]")
            missing.append(name)
    place = engine.place()
    table.add_row("device", f"{runs.hardware(place.device)}, {place.precision}")
    table.add_row("notebooks", ", ".join(runs.notebook_names()))
    problems = [f"{', '.join(missing)}: pip install 'ptglab\\[lab]'"] if missing else []
    try:
        root = data.root()
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        holds = f"holds {', '.join(found[:8])}" if found else "is empty or not there; digits need nothing"
        table.add_row("data root", f"{root.resolve()} {holds}")
    except InputError as error:
        problems.append(str(error))
    table.add_row("free disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GB here")
    Console().print(table)
    for problem in problems:
        Console().print(f"missing: {problem}")
    if not problems:
        print("nothing is missing")


def _values(notebook: str, given: Iterable[str]) -> dict:
    """Parse NAME=VALUE texts by the types of the notebook's parameters. Raises InputError."""
    declared = runs.declared_parameters(notebook)
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"'{text}' is no parameter: write it as NAME=VALUE")
        kind = type(declared.get(name, ""))
        try:
            values[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise InputError(f"parameter '{name}' is '{value}'; it must be of type {kind.__name__}") from None
        if text != text.encode("utf-8", "replace").decode():  # bytes of a file name that no notebook can hold
            raise InputError(f"parameter '{name}' is no text: {value!r}; rename what it names")
    return runs.checked(notebook, declared, values)


def _execute(notebook: str, out: Path, values: dict) -> None:
    """Execute a notebook by papermill, its output streamed; an error inside it ends in one line."""
    if importlib.util.find_spec("papermill") is None:
        raise InputError("papermill is not installed, which executes notebooks: pip install 'ptglab[lab]'")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # the kernel's debugger, about frozen modules
    import papermill
    from traitlets.config import Config

    source, running = str(runs.notebook_path(notebook)), out.with_name(f".running-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            source, str(running), values, kernel_name="python3", progress_bar=False,
            stdout_file=sys.stdout, stderr_file=sys.stderr,
            config=Config(KernelManager={"transport": "ipc"}),  # no open ports
        )  # fmt: skip
        running.replace(out)
    except papermill.PapermillExecutionError as error:
        if error.ename == "InputError":  # nothing was done: an earlier copy stays
            raise InputError(error.evalue) from None
        running.replace(failed := out.with_name(f"failed-{out.name}"))
        raise InputError(f"{error.ename}: {error.evalue} (cell {error.exec_count} of {failed})") from None
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    finally:
        running.unlink(missing_ok=True)


def _print_summary(run: runs.Run) -> None:
    """Print the results as a table: mean and standard deviation over noise seeds."""
    frame = run.results()
    table = Table(title=f"{frame['noise'][0]} noise, nominal {frame['noise_rate'][0]:.0%}, "
                        f"effective {frame['effective_rate'].mean():.1%}; {frame['seed'].nunique()} noise seeds; "
                        f"{frame['n_train'][0]:,} images; percent, mean ± standard deviation")  # fmt: skip
    measures = ("accuracy_last", "accuracy_best", "accuracy_selected", "f1", "balanced_accuracy")
    for heading in ("start", "mode", "last", "best (oracle)", "selected", "detector", "F1", "balanced"):
        table.add_column(heading, justify="left" if heading in ("start", "mode", "detector") else "right", no_wrap=True)
    for (init, mode), group in frame.groupby(["init", "mode"], sort=False):
        for row, (detector, rows) in enumerate(group.groupby("detector", sort=False)):
            cells = [f"{100 * rows[m].mean():.1f} ± {100 * rows[m].std(ddof=0):.1f}" for m in measures]
            first = [init, mode, *cells[:3]] if row == 0 else [""] * 5
            table.add_row(*first, detector, *cells[3:])
    Console(width=max(118, Console().width)).print(table)


def _print_audit(run: runs.Run) -> None:
    """Print what an audit found, where it lies, and what to do with it."""
    told = json.loads((run.path / "summary.json").read_text())
    console = Console()
    console.print(
        f"\n[bold]{told['flagged']:,} of {told['images']:,} labels look wrong[/] ({told['detector']}); "
        f"estimated share of wrong labels {told['rate']:.1%} "
        f"(all estimates with their 95 % intervals: {told['low']:.1%} to {told['high']:.1%})"
    )
    if told["unreadable"]:
        console.print(f"{told['unreadable']:,} left out, see unreadable.csv")
    table = Table("given", "suggested", "labels", title="most frequent", title_justify="left", box=None)
    for given, suggested, number in told["confusions"][:5]:
        table.add_row(Text(given), Text(suggested), f"{number:,}")
    console.print(table)
    print(f"\nlook at   {run.path / 'gallery.html'}\nread      {run.path / 'report.ipynb'}")
    print(f"work with {run.path / 'suspects.csv'}, label_studio.json, fiftyone.csv, duplicates.csv, outliers.csv")


def main() -> None:
    """Run the command line; what a person can mend is one line on stderr and exit status 2."""
    try:
        cli(standalone_mode=False)
    except (InputError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else error
        print(f"ptglab: {message}", file=sys.stderr)
        sys.exit(2)
    except click.Abort:
        print("ptglab: stopped", file=sys.stderr)
        sys.exit(130)
