"""The rules of the house that a program can check, on the source alone; each rule is shown to catch an offender."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ptglab"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("*.py"))}
every_module = pytest.mark.parametrize("module", SOURCES)

DISK = ["files", "tensors", "checkpoints"]  # each uses those before it
FOUNDATIONS = {"errors", "execution", "neighbours", "decode", "folders", "listed", "parquet", "suspects", "tables"}
FOUNDATIONS |= {"stopping", "corrections", "collectives", "sources", "cache", *DISK}
DETECTION = ["confident", "noise_rate", "feature_detectors", "planted", "label_errors"]  # each uses those before it
LEAVES = {"data", "noise", "augment", "backbones", "losses", "optim", "metrics", "figures", "runs", "live"}
LEAVES |= {"oddities", *DETECTION}
LOOPS = {"pretrain", "finetune", "predict", "patches"}
ROOMS = {"board", "recipes", "review", "spec", "sweep", "peers", "speed", "audit", "exports", "determinism", "cluster"}
ROOMS |= {"explorer", "findings", "lasso", "panel", "stored", "scale"}
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    **dict.fromkeys(["neighbours", "suspects"], {"errors"}),
    "decode": {"errors", "files"},
    **{module: {"errors", *DISK[:i]} for i, module in enumerate(DISK)},
    "checkpoints": {"errors", "collectives", "files", "tensors"},
    "collectives": set(),
    "stopping": {"files"},
    "execution": {"errors", "files"},
    "tables": set(),
    "corrections": {"errors", "files", "folders"},
    "folders": {"errors", "decode"},
    "listed": {"errors", "decode", "folders"},
    "parquet": {"errors", "folders"},
    "sources": {"parquet"},
    "cache": {"errors", "decode", "files", "sources"},
    **dict.fromkeys(LEAVES, FOUNDATIONS),
    **{module: FOUNDATIONS | set(DETECTION[:i]) for i, module in enumerate(DETECTION)},
    "oddities": {"decode"},
    "live": {"figures"},
    "runs": FOUNDATIONS | {"live"},
    "engine": FOUNDATIONS | LEAVES,
    "processes": FOUNDATIONS | {"engine"},
    **dict.fromkeys(LOOPS, FOUNDATIONS | LEAVES | {"engine"}),
    **dict.fromkeys(ROOMS, FOUNDATIONS | LEAVES | {"engine"} | LOOPS),
    "scale": {"errors"},
    "speed": FOUNDATIONS | LEAVES | {"engine", "peers"} | LOOPS,
    "spec": FOUNDATIONS | LEAVES | {"engine", "recipes"} | LOOPS,
    "cluster": FOUNDATIONS | LEAVES | {"engine", "spec", "__version__"},
    "sweep": FOUNDATIONS | LEAVES | {"engine", "spec", "cluster"},
    "board": {"spec", "sweep"},
    "exports": FOUNDATIONS | LEAVES | {"__version__"},
    "findings": FOUNDATIONS | LEAVES | {"engine", "audit", "exports"} | LOOPS,
    "panel": FOUNDATIONS | LEAVES | {"exports"},
    "review": FOUNDATIONS | LEAVES | {"exports", "findings", "panel"},
    "stored": FOUNDATIONS | LEAVES | {"findings", "spec", "sweep"},
    "lasso": {"figures", "panel"} | FOUNDATIONS,
    "explorer": FOUNDATIONS | LEAVES | {"exports", "findings", "lasso", "panel", "review", "stored"},
    "cli": FOUNDATIONS | LEAVES | {"engine"} | LOOPS | ROOMS | {"processes", "__version__"},
}
HEAVY = {"papermill", "jupyter", "jupyterlab", "jupyter_client", "jupyter_core", "notebook", "ipykernel", "ipywidgets",
         "IPython", "plotly", "umap", "faiss", "seaborn", "dask", "distributed", "nbformat", "nbclient", "nbconvert",
         "anywidget"}  # fmt: skip
GENERATORS = {"default_rng", "Generator", "SeedSequence", "PCG64"}  # of np.random; the rest is global state
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal"}
BLIND = {*DETECTION, "suspects", "predict", "finetune", "pretrain", "losses", "engine"}  # they never see the truth


def dotted(node: ast.AST) -> str:
    """Return "np.random.seed" of the expression, "" of what is no dotted name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield (statement, full name) of every import, also inside functions; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "ptglab" if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def from_ptglab(source: str) -> set[str]:
    """Return the modules of ptglab that `source` imports; "*" for ptglab itself, which hides which."""
    names = [name.split(".") for _, name in imported(ast.parse(source))]
    return {(name[1:] or ["*"])[0] for name in names if name[0] == "ptglab"}


def heavy_at_the_top(source: str) -> set[str]:
    """Return the heavy packages that importing `source` would import: anything outside functions."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    return {name.split(".")[0] for node, name in imported(tree) if id(node) not in inside} & HEAVY


def undocumented(source: str) -> list[str]:
    """Return the public functions and classes at the top level that have no docstring."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = [node for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")]
    return [node.name for node in found if not ast.get_docstring(node)]


def pickles(source: str) -> list[str]:
    """Return what would read or write Python objects: pickle and its like, and switches that let it in."""
    tree, found = ast.parse(source), []
    for _, name in imported(tree):
        if {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(name.split(".")):
            found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.endswith("_pickle"):
            found.append(node.attr)
        if isinstance(node, ast.Call):
            switches = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if switches.get("allow_pickle", False) is not False:
                found.append("allow_pickle")
            if dotted(node.func) == "torch.load" and switches.get("weights_only") is not True:
                found.append("torch.load")
            if dotted(node.func) == "torch.save":
                found.append("torch.save")
    return found


def global_draws(source: str) -> list[str]:
    """Return what reads or sets a global random state; `torch.random.fork_rng` puts torch's back afterwards."""
    tree, found = ast.parse(source), []
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(getattr(i.context_expr, "func", None) is not None
                and dotted(i.context_expr.func) == "torch.random.fork_rng" for i in node.items)
        for inner in ast.walk(node)
    }  # fmt: skip
    for _, name in imported(tree):
        legacy = name.startswith("numpy.random.") and name.split(".")[2] not in GENERATORS
        if name.split(".")[0] == "random" or legacy:
            found.append(name)
    for node in ast.walk(tree):
        name = dotted(node)
        parts = name.split(".")
        if parts[:2] in (["np", "random"], ["numpy", "random"]) and len(parts) == 3 and parts[2] not in GENERATORS:
            found.append(name)
        seeds = parts[0] == "torch" and parts[-1] in {"manual_seed", "manual_seed_all", "seed", "seed_all"}
        if seeds and id(node) not in forked:
            found.append(name)
        if isinstance(node, ast.Call) and id(node) not in forked:
            function = dotted(node.func).split(".")
            if function[0] == "torch" and len(function) == 2 and function[1] in TORCH_DRAWS:
                seeded = any(keyword.arg == "generator" for keyword in node.keywords)
                found += [] if seeded else [dotted(node.func)]
            if function in (["np", "random", "default_rng"], ["numpy", "random", "default_rng"]):
                found += [] if node.args or node.keywords else ["default_rng()"]
    return found


def truths(source: str) -> list[str]:
    """Return the names in `source` that hold the truth."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
        found += [name] if name in {"labels_true", "is_flipped"} else []
    return found


@every_module
def test_imports_go_one_way(module):
    assert module in MAY_IMPORT, f"{module}.py has no place among the layers: give it one here and in the README"
    assert from_ptglab(SOURCES[module]) <= MAY_IMPORT[module]


@every_module
def test_heavy_packages_are_imported_where_they_are_used(module):
    assert not heavy_at_the_top(SOURCES[module])


@every_module
def test_every_public_name_has_a_docstring(module):
    assert ast.get_docstring(ast.parse(SOURCES[module]))
    assert not undocumented(SOURCES[module])


@every_module
def test_nothing_is_pickled(module):
    assert not pickles(SOURCES[module])


@every_module
def test_randomness_is_an_argument(module):
    assert not global_draws(SOURCES[module])


@pytest.mark.parametrize("module", sorted(BLIND))
def test_training_and_detection_never_see_the_truth(module):
    assert not truths(SOURCES[module])


@every_module
def test_no_module_is_longer_than_350_lines(module):
    assert len(SOURCES[module].splitlines()) <= 350


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - {"__init__", "cli"}))
def test_every_module_has_its_tests(module):
    assert (PACKAGE.parent / "tests" / f"test_{module}.py").is_file()


def test_the_rooms_of_the_plan_are_there():
    """No drawer for everything, no package within the package, and every layer of the plan but the last two exists."""
    assert not {"utils", "util", "helpers", "misc", "common"} & SOURCES.keys()
    assert [path.name for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []
    assert MAY_IMPORT.keys() - ROOMS - {"cli"} <= SOURCES.keys()


IMPORT_WITHOUT = """
import importlib, sys
blocked = set(sys.argv[1].split(","))

class Block:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block)
for module in sys.argv[2].split(","):
    importlib.import_module("ptglab." + module)
print(sorted({name.split(".")[0] for name in sys.modules} & blocked))
"""


def import_without(blocked: set[str], modules: set[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", IMPORT_WITHOUT, ",".join(sorted(blocked)), ",".join(sorted(modules))]
    return subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)


def test_the_core_imports_on_a_bare_machine():
    done = import_without(HEAVY, SOURCES.keys() - ROOMS - {"__init__", "cli"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_the_bare_machine_is_really_bare():
    """The same, with a package blocked that a module does need."""
    done = import_without({"numpy"}, {"noise"})
    assert done.returncode != 0 and "numpy is blocked" in done.stderr


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ptglab import engine, runs", {"engine", "runs"}),
        ("from ptglab.errors import InputError", {"errors"}),
        ("import ptglab.cli as c", {"cli"}),
        ("import ptglab", {"*"}),
        ("from . import predict", {"predict"}),
        ("from .finetune import train", {"finetune"}),
        ("def f():\n    from ptglab import sweep", {"sweep"}),
        ("import numpy\nfrom torch import nn", set()),
    ],
)
def test_rule_of_imports_sees(source, expected):
    assert from_ptglab(source) == expected


@pytest.mark.parametrize(
    ("rule", "offence"),
    [
        (heavy_at_the_top, "import seaborn as sns"),
        (heavy_at_the_top, "from IPython.display import display"),
        (heavy_at_the_top, "try:\n    import umap\nexcept ImportError:\n    umap = None"),
        (heavy_at_the_top, "class A:\n    import dask.distributed"),
        (undocumented, "def f():\n    return 1"),
        (undocumented, "class A:\n    x = 1"),
        (pickles, "import pickle"),
        (pickles, "from joblib import dump"),
        (pickles, "np.load(path, allow_pickle=True)"),
        (pickles, "np.load(path, allow_pickle=flag)"),
        (pickles, "torch.load(path)"),
        (pickles, "torch.load(path, weights_only=False)"),
        (pickles, "frame.to_pickle(path)"),
        (pickles, "torch.save(x, path)"),
        (global_draws, "np.random.seed(0)"),
        (global_draws, "x = np.random.randn(3)"),
        (global_draws, "f = np.random.rand"),
        (global_draws, "from numpy.random import normal"),
        (global_draws, "import random"),
        (global_draws, "np.random.default_rng()"),
        (global_draws, "torch.manual_seed(0)"),
        (global_draws, "torch.default_generator.manual_seed(0)"),
        (global_draws, "torch.cuda.manual_seed_all(0)"),
        (global_draws, "with torch.no_grad():\n    torch.manual_seed(0)"),
        (global_draws, "torch.randperm(5)"),
        (truths, "def f(labels_true): pass"),
        (truths, "data.labels_true"),
        (truths, "is_flipped = 1"),
    ],
)
def test_rule_catches(rule, offence):
    assert rule(offence)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (heavy_at_the_top, "def f():\n    import papermill"),
        (undocumented, "def _f():\n    return 1"),
        (undocumented, 'def f():\n    """Return 1."""\n    return 1'),
        (pickles, "np.load(path, allow_pickle=False)"),
        (pickles, "torch.load(path, weights_only=True)"),
        (global_draws, "np.random.default_rng(seed)"),
        (global_draws, "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(seed)"),
        (global_draws, "torch.Generator(device).manual_seed(seed)"),
        (global_draws, "torch.rand(5, generator=generator)"),
        (truths, "labels_given"),
    ],
)
def test_rule_lets_pass(rule, source):
    assert not rule(source)
