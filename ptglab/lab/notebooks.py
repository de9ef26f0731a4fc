"""Notebooks: which there are, which parameters they declare, and how papermill executes one."""

import ast
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ptglab.errors import InputError, one_of
from ptglab.files import GO_ON, write, writing
from ptglab.text import printable

NOT_IDENTITY = {"run_dir", "device", "devices"}  # parameters that do not change what a run computes
# Where packages keep files of their own; HOME itself stays: weights that were downloaded are read from there.
HOMES = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR", "NUMBA_CACHE_DIR")
PARENT_ON_STDIN = "PTGLAB_PARENT_ON_STDIN"  # set by a sweep, whose cells die with it


def parameters(notebook: str, namespace: dict) -> dict[str, bool | int | float | str]:
    """Return the values that `namespace` (a notebook's globals) holds for the parameters `notebook` declares.

    papermill writes what it was given into a cell of its own and only warns of undeclared names; that cell, in
    IPython's `In`, is read here. Raises InputError for such a name, with the nearest, and for a value of another type.
    """
    declared = declared_parameters(notebook)
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    given = {target.id for cell in injected for node in ast.parse(cell).body for target in node.targets}
    return checked(notebook, declared, {name: namespace[name] for name in declared.keys() | given})


def checked(notebook: str, declared: dict, values: dict) -> dict:
    """Return `values` if each is declared with its type; see `parameters`. An int is accepted for a float.

    Numbers must be finite and fit into 64 bits, as the code that computes with them expects.
    """
    for name, value in values.items():
        kind = type(declared[one_of(f"parameter of {notebook}", name, declared)])
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise InputError(f"parameter '{name}' of {notebook} is {_short(value)}; it must be of type {kind.__name__}")
        if kind in (int, float) and not -(2**63) <= value < 2**63:  # nor nan, which is never equal or less
            raise InputError(f"parameter '{name}' of {notebook} is {_short(value)}; it must be a number of 64 bits")
    return values


def _short(value: object) -> str:
    """Return `value` as it is written in Python, cut to what a message can hold."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python does not write numbers of more than 4,300 digits
        return "a number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def declared_parameters(notebook: str) -> dict[str, bool | int | float | str]:
    """Return {name: default} from the cell tagged `parameters` of a notebook: one of ours by name, or any by path."""
    cells = json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]
    source = next(("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])), "")
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def notebook_path(notebook: str) -> Path:
    """Return the file of a notebook: one of ours, named as "02_pretrain", in the wheel or the checkout; or a path.

    Raises InputError, naming ours, if there is no such notebook.
    """
    if Path(notebook).suffix == ".ipynb" and Path(notebook).is_file():
        return Path(notebook)
    ours = notebook_names()
    return ours[one_of("notebook", Path(notebook).stem, ours)]


def notebook_names() -> dict[str, Path]:
    """Return the names of our notebooks, each with its file."""
    inside, beside = (Path(__file__).parents[i] / "notebooks" for i in (1, 2))
    return {path.stem: path for path in sorted((inside if inside.is_dir() else beside).glob("*.ipynb"))}


def execute(notebook: str, out: Path, values: dict) -> None:
    """Execute a notebook by papermill, with its output streamed, and put the executed copy at `out`.

    Raises KeyboardInterrupt if it was stopped, InputError if it failed or its kernel died: an earlier `out` stays then.
    """
    if importlib.util.find_spec("papermill") is None:
        raise InputError("papermill is not installed, which executes notebooks: pip install 'ptglab[lab]'")
    if os.environ.pop(PARENT_ON_STDIN, ""):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if os.path.isdir(out) or str(out) != str(out).encode("utf-8", "replace").decode():
        raise InputError(f"cannot write {out}: it must be a file, and its name UTF-8")
    with writing("temporary files, for which TMPDIR names a folder", every=True):
        near = "/tmp" if len(os.fsencode(tempfile.gettempdir())) > 70 else None  # sockets' paths have 107 bytes at most
        folder = tempfile.TemporaryDirectory(prefix="ptglab-", dir=near, ignore_cleanup_errors=True)
    with folder as place:
        with writing(out, every=True):
            out.parent.mkdir(parents=True, exist_ok=True)
        _execute(notebook, out, values, Path(place))


def _kernel(place: Path) -> type:
    """Return the class that starts kernels: of this Python, importing nothing from the working folder.

    Images lie there, and modules beside them are not ours to run. Another kernel that the user calls `python3` is not
    used, which is said. Where the home cannot be written, packages keep what they must in `place`.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    with suppress(Exception):  # there is none, or a damaged one
        named = KernelSpecManager().get_kernel_spec("python3")
        if named.argv[0] != "python" and os.path.dirname(named.argv[0]) != os.path.dirname(sys.executable):
            said = f"the kernel python3 in {named.resource_dir} is not used: notebooks run by {sys.executable}"
            print(printable(said), file=sys.stderr)
    environment = {"PYTHONSAFEPATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # its debugger, about frozen modules
    if not os.access(os.path.expanduser("~"), os.W_OK):
        environment |= dict.fromkeys(HOMES, str(place))
    command = [sys.executable, "-P", "-m", "ipykernel", "-f", "{connection_file}", "--IPKernelApp.ignore_cwd=True"]

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, env=environment)

    return Kernel


def _execute(notebook: str, out: Path, values: dict, place: Path) -> None:
    """Execute a notebook, working in the folder `place`; see `execute`."""
    import papermill
    from traitlets.config import Config

    source, running = str(notebook_path(notebook)), place / "notebook.ipynb"
    # papermill fills parameters into names in braces; these are names of files
    literal = [path.replace("{", "{{").replace("}", "}}") for path in (source, str(running))]
    files = {"transport": "ipc", "ip": f"{place}/kernel", "connection_file": f"{place}/kernel.json"}  # no open ports
    try:
        with writing(place, every=True):
            papermill.execute_notebook(
                *literal, values, kernel_name="python3", kernel_manager_class=_kernel(place), progress_bar=False,
                stdout_file=sys.stdout, stderr_file=sys.stderr, config=Config(KernelManager=files),
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # a stopped kernel complains about its sockets
            )  # fmt: skip
        _keep(running, out)
    except papermill.PapermillExecutionError as error:
        if error.ename in ("Stopped", "KeyboardInterrupt"):
            raise KeyboardInterrupt from None
        if error.ename == "InputError":  # nothing was done: an earlier copy stays
            raise InputError(error.evalue) from None
        _keep(running, failed := out.with_name(f"failed-{out.name}"))
        raise InputError(f"{error.ename}: {error.evalue} (cell {error.exec_count} of {failed})") from None
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would report the task that was stopped
        raise
    except RuntimeError as error:
        if "Kernel died" not in str(error):
            raise
        raise InputError(f"the kernel of {notebook} died{_where(running)}: it was killed, or the machine's memory was "
                         f"full; {GO_ON}") from None  # fmt: skip


def _keep(running: Path, out: Path) -> None:
    """Put the executed copy at `out`, whole."""
    with writing(out, every=True):
        write(out, lambda temporary: shutil.copyfile(running, temporary))


def _end_with_parent() -> None:
    """Wait until the parent's end of standard input closes, as it does when the parent dies; then end at once.

    A kernel notices within a second that this process, its parent, is gone.
    """
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _where(running: Path) -> str:
    """Return " in cell N", the last cell that papermill began, as far as its copy on disk shows."""
    with suppress(OSError, ValueError, KeyError):
        cells = json.loads(running.read_text(encoding="utf-8"))["cells"]
        begun = [i for i, c in enumerate(cells, 1) if c["metadata"].get("papermill", {}).get("start_time")]
        return f" in cell {begun[-1]}" if begun else ""
    return ""


def values(notebook: str, given: Iterable[str]) -> dict:
    """Return the NAME=VALUE texts as values of the types that the notebook declares. Raises InputError."""
    declared = declared_parameters(notebook)
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"'{printable(text)}' is no parameter: write it as NAME=VALUE")
        if name == "run_dir" and values.get(name, value) != value:
            raise InputError(f"run_dir is given twice, as {values[name]} and as {value}: give --out alone")
        kind = type(declared.get(name, ""))
        try:
            values[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise InputError(f"parameter '{name}' is {_short(value)}; it must be of type {kind.__name__}") from None
        if text != text.encode("utf-8", "replace").decode():  # bytes of a file name that no notebook can hold
            raise InputError(f"parameter '{name}' is no text: {value!r}; rename what it names")
    return checked(notebook, declared, values)
