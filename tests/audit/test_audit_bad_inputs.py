"""What people leave in folders of images, through the whole audit: one clear line, or all that can be read audited."""

import csv
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from bad_inputs import CASES

from ptglab.errors import InputError
from ptglab.lab import notebooks
from ptglab.train import patches

matplotlib.use("Agg")

NOTEBOOK = "06_audit_your_images"
SOME = CASES[::20]


@pytest.fixture
def fewer_samples(monkeypatch):
    """Patches of a dozen small images are soon drawn twice."""
    monkeypatch.setattr(patches, "SAMPLES", 1000)


def audit(**params) -> None:
    """Run the notebook's cells here, as papermill would in a kernel, with `params` after its parameters cell."""
    namespace = {"display": print}
    for cell in json.loads(notebooks.notebook_path(NOTEBOOK).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace |= params
    plt.close("all")


def rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check(case, folder: Path) -> None:
    (folder / "source").mkdir()
    source, labels = case.build(folder / "source")
    out = folder / "out"
    try:
        audit(dataset=str(source), labels=labels or "", run_dir=str(out), start="scratch")
    except InputError as error:
        assert "\n" not in str(error)
        assert case.expected == "refused" or case.readable < 10 or "same label" in str(error), error
        return
    assert case.expected == "audited"
    found, left = rows(out / "suspects.csv"), rows(out / "unreadable.csv")
    assert len(found) == len({row["id"] for row in found}) == case.readable
    assert case.listed is None or len(left) == case.listed
    assert not {row["id"] for row in found} & {row["id"] for row in left}
    page = (out / "gallery.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and "<img src=x" not in page
    assert {p.name for p in out.iterdir()} >= {"label_studio.json", "fiftyone.csv", "duplicates.csv", "outliers.csv"}


@pytest.mark.filterwarnings("ignore:n_jobs value", "ignore:.*missing from.*font", "ignore:Glyph")
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_some_cases(case, tmp_path, fewer_samples):
    check(case, tmp_path)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:n_jobs value", "ignore:.*missing from.*font", "ignore:Glyph")
@pytest.mark.parametrize("case", [case for case in CASES if case not in SOME], ids=lambda case: case.name)
def test_every_other_case(case, tmp_path, fewer_samples):
    check(case, tmp_path)
