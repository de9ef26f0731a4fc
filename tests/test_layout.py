"""Rules of the house that a program can check on the source alone; each is shown to catch an offender.

import-linter keeps the direction of imports, and ruff keeps docstrings, heavy packages and pickles out; both are
configured in pyproject.toml and run before the tests. What neither can express is here.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ptglab"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
CORE = {"PIL", "filelock", "huggingface_hub", "joblib", "matplotlib", "numpy", "pandas", "ptglab", "pyarrow",
        "safetensors", "scipy", "sklearn", "timm", "torch", "torchvision", "tqdm",
        *sys.stdlib_module_names}  # fmt: skip
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal"}


def dotted(node: ast.AST) -> str:
    """Return "np.random.seed" for that expression, "" for anything that is not a dotted name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, dict]]:
    """Yield each call, the dotted name that is called, and its keyword arguments that are literals."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func), {k.arg: getattr(k.value, "value", None) for k in node.keywords}


def imported(nodes) -> Iterator[str]:
    """Yield the full name of every import among `nodes`; `from a import b` is a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def beyond_the_core(source: str) -> set[str]:
    """Return the packages, other than those that training needs, that the module imports outside of functions."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    return {name.split(".")[0] for name in imported(n for n in ast.walk(tree) if id(n) not in inside)} - CORE


def lazy(source: str) -> list[str]:
    """Return the modules imported as notebooks may, from the top of the package, which import-linter cannot see."""
    rooms = {path.stem for path in PACKAGE.iterdir()} | {"__version__"}
    names = [name.split(".") for name in imported(ast.walk(ast.parse(source)))]
    return [name[1] for name in names if name[0] == "ptglab" and len(name) == 2 and name[1] not in rooms]


def unpickling(source: str) -> list[str]:
    """Return the calls that would let a file run code: torch's and NumPy's loaders without their restriction."""
    loads = [(name, options) for _, name, options in calls(ast.parse(source))]
    found = [name for name, options in loads if name == "torch.load" and options.get("weights_only") is not True]
    return found + [name for name, options in loads if options.get("allow_pickle", False) is not False]


def global_draws(source: str) -> list[str]:
    """Return the calls that read or set a global random state; `torch.random.fork_rng` restores torch's afterwards."""
    tree = ast.parse(source)
    forks = [node for node in ast.walk(tree) if isinstance(node, ast.With) and "fork_rng" in ast.dump(node.items[0])]
    forked, found = {id(inner) for fork in forks for inner in ast.walk(fork)}, []
    for node, name, options in calls(tree):
        package, function = name.split(".")[0], name.split(".")[-1]
        seeds = package == "torch" and function in ("manual_seed", "manual_seed_all", "seed", "seed_all")
        draws = name.removeprefix("torch.") in TORCH_DRAWS and package == "torch" and "generator" not in options
        unseeded = function == "default_rng" and not node.args and not options
        found += [name] if unseeded or ((seeds or draws) and id(node) not in forked) else []
    return found


def truths(source: str) -> list[str]:
    """Return the names in a module that hold the truth."""
    names = [getattr(node, kind, None) for node in ast.walk(ast.parse(source)) for kind in ("id", "arg", "attr")]
    return [name for name in names if name in ("labels_true", "is_flipped")]


CASES = [
    (lazy, "", "from ptglab import engine", "from ptglab import data, files\nfrom ptglab.train import engine"),
    (unpickling, "", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=False)"),
    (unpickling, "", "torch.load(path)", "torch.load(path, weights_only=True)"),
    (global_draws, "", "np.random.default_rng()", "np.random.default_rng(seed)"),
    (global_draws, "", "torch.cuda.manual_seed_all(0)", "with torch.random.fork_rng():\n    torch.manual_seed(0)"),
    (global_draws, "", "torch.randperm(5)", "torch.randperm(5, generator=g)\ntorch.Generator().manual_seed(0)"),
    (beyond_the_core, "data train detect", "if True:\n    import dask.array", "def f():\n    import dask\nimport json"),
    (truths, "train detect", "images.labels_true", "images.labels_given"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "rooms", "offence", "allowed"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_module_keeps_the_rule_and_the_rule_sees(rule, rooms, offence, allowed):
    chosen = {path: source for path, source in SOURCES.items() if not rooms or path.split("/")[0] in rooms.split()}
    assert {path: found for path, source in chosen.items() if (found := rule(source))} == {}
    assert rule(offence) and not rule(allowed)


OFFENCES = ["import papermill", "import pickle", "import torch\ntorch.save(1, 'x')", "import random",
            "def f():\n    return 1", "import numpy as np\nnp.random.seed(0)"]  # fmt: skip


@pytest.mark.parametrize("offence", OFFENCES)
def test_ruff_catches(offence):
    code = f'"""Title."""\n\n{offence}\n'
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "ptglab/data/x.py", "-"]
    done = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and any(rule in done.stdout for rule in ("TID25", "D103", "NPY002")), done.stdout
