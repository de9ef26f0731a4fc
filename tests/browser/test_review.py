"""Notebook 7 in a real JupyterLab: decisions by mouse and keyboard, undone, kept over a reload and a new kernel."""

import csv
import itertools
from pathlib import Path

import pytest
from reviewed import leave

pytestmark = pytest.mark.browser
CURRENT = "return document.querySelector('.ptglab-review [aria-current] img').alt"


def decided(path: Path) -> list[tuple[str, str, str]]:
    """Return (id, decision, label) of the lines that are on disk."""
    with open(path, newline="") as file:
        return [(row["id"], row["decision"], row["label"]) for row in csv.DictReader(file)]


def test_suspects_are_reviewed_applied_and_learned_from(lab, tmp_path):
    leave(tmp_path / "audit")
    page = lab("07_review_suspects", audit_run=str(tmp_path / "audit"))
    page.run(".ptglab-review")
    corrections = page.folder / "runs" / "07_review_suspects" / "corrections.csv"
    assert not corrections.exists() or decided(corrections) == []
    number = itertools.count(1)

    def decides(act, *words) -> None:
        """Do it, and wait for the next picture: by then the decision is on disk, and keys mean that one."""
        before = page.script(CURRENT)
        act(*words)
        page.until(lambda: page.script(CURRENT) != before, "the next picture")
        assert len(decided(corrections)) == next(number)

    for name in ["suggest", "suggest", "keep", "drop", "suggest", "choose"]:
        decides(page.click, f".ptglab-{name}")
    keys = page.browser.switch_to.active_element  # the box: a click with the mouse leaves the keys to it
    assert "ptglab-review" in keys.get_attribute("class")
    for key in ["s", "k", "d", "s", "s", "s", "enter", "k"]:
        decides(keys.send_keys, "\n" if key == "enter" else key)
    for left in (13, 12):
        keys.send_keys("u")
        page.until(lambda left=left: len(decided(corrections)) == left, "an undone decision")
    standing = decided(corrections)
    assert len(standing) == 12 and len({id for id, *_ in standing}) == 12
    assert [d for _, d, _ in standing][:5] == ["suggestion", "suggestion", "keep", "drop", "suggestion"]
    page.shoot("review")

    page.load()
    page.restart()
    page.run(".ptglab-review")
    assert page.text(".ptglab-progress-box").startswith("12 of ")
    assert decided(corrections) == standing
    page.click(".ptglab-apply")
    mended = corrections.with_name("mended.csv")
    page.until(mended.exists, "mended.csv")
    page.click(".ptglab-train")
    page.until(lambda: page.find(".ptglab-result-box table"), "a table of before and after")
    table = page.script("return [...document.querySelectorAll('.ptglab-result-box tr')].map((r) => "
                        "[...r.children].map((c) => c.innerText))")  # fmt: skip
    page.shoot("trained")
    estimated = [row for row in table if row[0].startswith("estimated")]
    assert estimated and all(float(after) < float(before) for _, before, after, *_ in estimated), table
