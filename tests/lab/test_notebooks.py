"""Notebooks: what they declare, what they are given, and what is left of an execution."""

import ast
import json
import os
import subprocess
import sys
import tempfile
import warnings
from importlib import util
from pathlib import Path

import pytest
from expected import refused
from IPython.core.inputtransformer2 import TransformerManager
from tiny_notebooks import write_notebook

from ptglab.lab import notebooks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import papermill
    import papermill.translators

DECLARED = dict(run_dir="runs/x", epochs=40, rate=0.4, offset=-1, cached=True)
CELL = "".join(f"{name} = {value!r}  # what it is\n" for name, value in DECLARED.items())


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "mine.ipynb", CELL, "epochs = epochs * 2")


def namespace(injected="", **changed):
    """What a notebook's globals hold once papermill's cell, made of literals, has run."""
    given = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(injected).body
             if isinstance(node, ast.Assign)}  # fmt: skip
    return DECLARED | changed | given | {"In": ["", "import this", CELL, injected]}


@pytest.mark.parametrize("lines", [False, True])
def test_a_notebook_by_its_path_declares_its_parameters(notebook, lines):
    content = json.loads(Path(notebook).read_text())
    content["cells"].insert(0, {"cell_type": "markdown", "metadata": {}, "source": ["# Question\n"]})
    if lines:
        content["cells"][1]["source"] = CELL.splitlines(keepends=True)
    Path(notebook).write_text(json.dumps(content))
    assert notebooks.declared_parameters(notebook) == DECLARED
    content["cells"][1]["metadata"] = {}
    Path(notebook).write_text(json.dumps(content))
    assert notebooks.declared_parameters(notebook) == {}


@pytest.mark.parametrize("folder", ["ptglab/notebooks", "notebooks"], ids=["wheel", "checkout"])
def test_our_notebooks_go_by_name(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(notebooks, "__file__", str(tmp_path / "ptglab" / "lab" / "notebooks.py"))
    (tmp_path / folder).mkdir(parents=True)
    path = write_notebook(tmp_path / folder / "02_pretrain.ipynb", CELL)
    write_notebook(tmp_path / folder / "03_finetune.ipynb", CELL)
    assert str(notebooks.notebook_path("02_pretrain")) == path
    assert notebooks.declared_parameters("02_pretrain") == DECLARED
    refused("'02_pretrian'", "'02_pretrain'", "03_finetune", call=notebooks.notebook_path)("02_pretrian")


def test_parameters_are_the_values_in_hand(notebook):
    assert notebooks.parameters(notebook, namespace()) == DECLARED
    assert notebooks.parameters(notebook, dict(DECLARED)) == DECLARED  # outside IPython there is no injected cell
    given = notebooks.parameters(notebook, namespace("# Parameters\nepochs = 3\nrun_dir = 'b'\n", rate=0.7, other="no"))
    assert given == DECLARED | {"epochs": 3, "run_dir": "b", "rate": 0.7}
    refused("'epohcs'", notebook, "'epochs'", call=notebooks.parameters)(
        notebook, namespace("# Parameters\nepohcs = 3\n")
    )
    own = "# Parameters of the figure\nimport math\nsize = (3, 4)\n"  # a cell of one's own
    assert notebooks.parameters(notebook, namespace(own)) == DECLARED


@pytest.mark.parametrize(
    ("values", "type_name"),
    [({"epochs": "3"}, "int"), ({"epochs": 3.0}, "int"), ({"epochs": True}, "int"), ({"rate": True}, "float"),
     ({"rate": "0.4"}, "float"), ({"cached": 1}, "bool"), ({"run_dir": None}, "str"), ({"run_dir": 3}, "str")],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_refused(notebook, values, type_name):
    [(name, value)] = values.items()
    given = namespace(f"# Parameters\n{name} = {value!r}\n")
    refused(f"'{name}'", notebook, repr(value), f"type {type_name}", call=notebooks.parameters)(notebook, given)


@pytest.mark.parametrize("values", [{"rate": 1}, {"epochs": 0}, {"offset": 2}, {"cached": False}], ids=str)
def test_a_value_that_will_do_is_kept(notebook, values):
    assert notebooks.parameters(notebook, namespace(**values)) == DECLARED | values


# ---- what the command line gives


def test_values_take_the_type_of_the_parameter(notebook):
    values = notebooks.values("02_pretrain", ["epochs=3", "learning_rate=1", "method=vicreg"])
    assert values == {"epochs": 3, "learning_rate": 1.0, "method": "vicreg"}
    assert isinstance(values["learning_rate"], float)
    for text in ("true", "True", "FALSE", "false"):
        assert notebooks.values(notebook, [f"cached={text}"]) == {"cached": text.lower() == "true"}
    assert notebooks.values(notebook, ["run_dir= c=", "offset=1", "run_dir= c=", "offset=-2"]) == {
        "run_dir": " c=", "offset": -2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs", ["'epochs'", "NAME=VALUE"]),
        ("epochs=many", ["'epochs' is 'many'", "type int"]),
        ("epochs=3.0", ["'epochs' is '3.0'", "type int"]),
        ("rate=", ["'rate' is ''", "type float"]),
        ("cached=1", ["'cached' is '1'", "type bool"]),
        ("epohcs=3", ["unknown parameter of", "'epohcs'", "'epochs'"]),
        ("run_dir=\udcff", ["'run_dir' is no text"]),
        ("run_dir=b", ["run_dir is given twice, as a and as b", "--out"]),
        ("rate=nan", ["'rate'", "64 bits"]),
        ("rate=-inf", ["'rate'", "64 bits"]),
        ("rate=1e999", ["'rate'", "64 bits"]),
    ],
)
def test_what_is_no_value_of_a_parameter_is_refused(notebook, text, words):
    refused(*words, call=notebooks.values)(notebook, ["offset=1", *["run_dir=a"] * (text == "run_dir=b"), text])


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**5000], ids=["above", "below", "huge"])
def test_a_number_of_more_than_64_bits_is_refused(value):
    for name in ("epochs", "rate"):
        refused(f"'{name}'", "64 bits", call=notebooks.checked)("mine", DECLARED, {name: value})
    assert notebooks.checked("mine", DECLARED, {"epochs": 2**63 - 1, "rate": -(2**63)})


# ---- a value is never code

HOSTILE = [
    '"); import os; os.system("touch marker"); ("', "'); open('marker', 'w'); ('", '\\"; open("marker", "w"); "',
    '\\\\"\nopen("marker", "w")\n"', '"""\nopen("marker", "w")\n"""', "\nopen('marker', 'w')\n",
    "\ropen('marker', 'w')\r", "\x0copen('marker', 'w')\x1c\x85\u2028open('marker', 'w')\u2029",
    "{open('marker', 'w')}", "{0.__class__}", "!touch marker", "x\n!touch marker", "%%bash\ntouch marker",
    "$(touch marker)`touch marker`; touch marker", "marker?", "#\n# Parameters\nmarker = 1", "\\", "\\\n", "\0",
    "\N{BULLET}\\u0022\\x22", "\U0001f98a\u202e", "\t=1+1",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_value_becomes_one_literal(notebook, value):
    """As papermill writes it into its cell, and as `parameters` reads that cell again."""
    given = notebooks.values(notebook, [f"run_dir={value}", "rate=-0.5", "epochs=-3", "cached=false"])
    cell = papermill.translators.PythonTranslator.codify(given)
    comment, *lines = cell.splitlines()
    assert comment == "# Parameters" and len(lines) == len(given)
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body} == given
    assert notebooks.parameters(notebook, namespace(cell)) == DECLARED | given
    assert TransformerManager().transform_cell(cell) == cell  # nothing of it is IPython's own


def test_no_value_runs_in_a_kernel(tmp_path, monkeypatch):
    """A kernel is given all of them; none does anything, each arrives."""
    names = [f"text{i}" for i in range(len(HOSTILE))]
    (folder := tmp_path / "a {folder} in {0} braces").mkdir()
    monkeypatch.chdir(folder)
    write_notebook(folder / "mine.ipynb", "".join(f"{name} = ''  # a text\n" for name in names),
                   f"import json, os\nprint(json.dumps([{', '.join(names)}]))\nprint(os.listdir())")  # fmt: skip
    given = notebooks.values("mine.ipynb", [f"{n}={value}" for n, value in zip(names, HOSTILE, strict=True)])
    notebooks.execute("mine.ipynb", folder / "out.ipynb", given)
    [output] = json.loads((folder / "out.ipynb").read_text())["cells"][-1]["outputs"]
    said, listed = "".join(output["text"]).splitlines()
    assert json.loads(said) == HOSTILE
    assert "marker" not in listed and sorted(path.name for path in folder.iterdir()) == ["mine.ipynb", "out.ipynb"]


# ---- executing


@pytest.fixture
def papermills(monkeypatch):
    """Return a function that makes papermill write a copy and then raise what it is given, instead of executing."""

    def replace(error=None):
        def run(source, out, values, **options):
            Path(out).write_text(f"{Path(source).name} with {values}")
            if error:
                raise error

        monkeypatch.setattr(papermill, "execute_notebook", run)

    return replace


def left(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_executed_copy_takes_its_place_in_the_end(notebook, tmp_path, papermills):
    papermills()
    for epochs in (3, 4):
        notebooks.execute(notebook, tmp_path / "run" / "notebook.ipynb", {"epochs": epochs})
        assert left(tmp_path / "run") == {"notebook.ipynb": f"mine.ipynb with {{'epochs': {epochs}}}"}


@pytest.mark.parametrize(
    ("name", "message", "failed"),
    [("InputError", "unknown dataset 'x'", {}),
     ("KeyError", "'x' (cell 7 of ", {"failed-notebook.ipynb": "mine.ipynb with {'epochs': 3}"})],
)  # fmt: skip
def test_an_error_inside_is_one_line_and_an_earlier_copy_stays(notebook, tmp_path, papermills, name, message, failed):
    """What is refused has done nothing; what failed leaves its copy under another name."""
    out = tmp_path / "run" / "notebook.ipynb"
    out.parent.mkdir()
    out.write_text("earlier")
    papermills(papermill.PapermillExecutionError(3, 7, "epochs / 0", name, message.split(" (")[0], ["Traceback\n"]))
    refused(message, call=notebooks.execute)(notebook, out, {"epochs": 3})
    assert left(out.parent) == {"notebook.ipynb": "earlier"} | failed


def test_an_execution_that_cannot_be_leaves_nothing(notebook, tmp_path, papermills, monkeypatch):
    out = tmp_path / "a.ipynb"
    papermills(OSError(28, "No space left on device"))
    refused(f"cannot write {tempfile.gettempdir()}", "the disk is full", call=notebooks.execute)(notebook, out, {})
    papermills()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        refused(f"cannot write {out}: Input/output error", call=notebooks.execute)(notebook, out, {})
    papermills(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        notebooks.execute(notebook, out, {})
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    refused("papermill is not installed", "pip install 'ptglab[lab]'", call=notebooks.execute)(notebook, out, {})
    assert left(tmp_path).keys() == {"mine.ipynb"}


def test_where_no_copy_can_be_is_one_line(notebook, tmp_path, papermills):
    papermills()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for out in ("folder", "file/a.ipynb", "loop/b/a.ipynb", f"{'n' * 300}/a.ipynb"):
        refused(f"cannot write {tmp_path / out}: ", call=notebooks.execute)(notebook, tmp_path / out, {})
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "loop", "mine.ipynb"}


@pytest.mark.parametrize("module", ["ptglab.lab.notebooks", "ptglab.files"])
def test_a_cells_process_starts_without_heavy_packages(module):
    """As told by Python itself, which lists what it imports."""
    command = [sys.executable, "-X", "importtime", "-m", module]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "filelock" in imported and not imported & {"torch", "papermill", "pandas", "numpy"}


def test_sockets_lie_where_their_paths_are_short_enough(tmp_path, notebook, monkeypatch):
    """Outside the working folder, in which a killed kernel would leave them."""
    given = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda source, out, values, **options: (
        given.append(options["config"]["KernelManager"]["ip"]), Path(out).write_text("")))  # fmt: skip
    for folder in (tmp_path, tmp_path / ("long" * 25)):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(notebooks.tempfile, "tempdir", str(folder))
        notebooks.execute(notebook, tmp_path / "out" / "a.ipynb", {})
    assert all(len(path) < 100 and not Path(path).parent.exists() for path in given) and given[1].startswith("/tmp/")
