"""The widgets of a review: each button and key does what it says; what the browser sends is sent by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
from reviewed import EVIL

from ptglab.lab import runs
from ptglab.ui import panel, review

pytest.importorskip("anywidget")


@pytest.fixture
def box(found, tmp_path) -> panel.Panel:
    return panel.Panel(review.Review(found, runs.Run(tmp_path), size=10))


def press(box: panel.Panel, key: str, row: int | None = None) -> None:
    box.page._handle_custom_msg({"key": key, "row": box.page.row if row is None else row}, [])


def decided(box: panel.Panel) -> list[str]:
    return [d.decision for d in box.review.corrections.rows]


@pytest.mark.parametrize(
    ("name", "key", "decision"),
    [
        ("keep", "k", "keep"), ("suggest", "s", "suggestion"), ("suggest", "enter", "suggestion"),
        ("drop", "d", "drop"), ("skip", "space", "skip"), ("choose", "7", "class"),
    ],
)  # fmt: skip
def test_buttons_and_keys_decide_alike(box, name, key, decision):
    box.list.value = 7
    box.buttons[name].click()
    press(box, key)
    assert decided(box) == [decision] * 2
    assert box.html["progress"].value.startswith('<span aria-live="polite">2 of ')
    rows = box.review.corrections.rows
    if decision == "class":
        assert [row.label for row in rows] == ["7", "7"]


def test_every_button_can_be_found_and_says_its_key(box):
    assert set(box.buttons) == {
        "keep", "suggest", "choose", "drop", "skip", "undo", "neighbours", "previous", "next", "previous-page",
        "next-page", "apply", "train",
    }  # fmt: skip
    for name, button in box.buttons.items():
        assert f"ptglab-{name}" in button._dom_classes and button.tooltip
    assert box.buttons["keep"].description == "Keep (k)"
    assert "ptglab-review" in box.box._dom_classes
    for name in ("picture", "progress"):
        assert f"ptglab-{name}" in box.html[name]._dom_classes


def test_a_decision_is_on_disk_before_the_next_picture_shows(box, monkeypatch):
    on_disk, show = [], box.show
    path = box.review.corrections.path
    monkeypatch.setattr(box, "show", lambda: (on_disk.append(path.read_text().count("\n")), show()))
    press(box, "k")
    press(box, "d")
    assert on_disk == [2, 3]


def test_a_key_for_an_earlier_picture_decides_nothing(box):
    first = box.page.row
    press(box, "k")
    press(box, "k", row=first)
    press(box, "3", row=first)
    assert decided(box) == ["keep"]
    press(box, "u", row=first)  # undo needs no picture
    assert decided(box) == [] and box.page.row == first


def test_what_no_key_means_is_ignored(box):
    for key in ("x", "apply now", "go", None):
        press(box, key)
    assert decided(box) == []


def test_moving_turns_pages_and_keeps_within_them(box):
    rows = box.review.queue.rows
    for key, place in [("arrowleft", 0), ("arrowright", 1), ("arrowdown", 11), ("arrowup", 1), ("arrowup", 0)]:
        press(box, key)
        assert box.page.row == rows[place] and box.page.place == place % 10, key
    for _ in range(20):
        press(box, "arrowdown")
    assert box.page.row == rows[-1]
    assert re.fullmatch(r"page (\d+) of \1", box.html["pages"].value)
    assert decided(box) == []


def test_a_card_is_gone_to_and_marked_once_decided(box):
    box.page._handle_custom_msg({"go": 4, "row": box.page.row}, [])
    assert box.page.place == 4 and box.page.row == box.review.queue.rows[4]
    cards = box.page.cards
    press(box, "d")
    assert box.page.marks[4] == "dropped" and box.page.marks[3] == "" and box.page.place == 5
    assert box.page.cards is cards  # the page's pictures are not made again


def test_neighbours_come_on_demand_and_go_with_the_next_picture(box):
    assert box.html["near-box"].value == ""
    press(box, "n")
    assert box.html["near-box"].value.count("<figure>") == 8
    press(box, "k")
    assert box.html["near-box"].value == ""


def test_filters_choose_and_count(box):
    pair = box.filters["pair"].options[1]
    box.filters["pair"].value = pair[1]
    assert f"({box.review.queue.total})" in pair[0]
    box.filters["detector"].value = "knn"
    assert box.filters["pair"].value == () and box.review.detector == "knn"
    total = box.review.queue.total
    low, high = box.filters["range"].min, box.filters["range"].max
    middle = float(np.median(box.review.suspects.score[box.review.queue.rows]))
    box.filters["range"].value = (low, middle)
    assert 0 < box.review.queue.total < total
    box.filters["range"].value = (low, high)
    box.filters["only_flagged"].value = False
    assert box.review.queue.total == 200
    press(box, "k")
    box.filters["state"].value = "skipped"
    assert box.page.row == -1 and box.page.cards == [] and "No suspect fits" in box.html["facts-box"].value
    press(box, "k")
    assert 'role="alert"' in box.html["status"].value and "nothing to decide" in box.html["status"].value


def test_apply_and_train_show_what_came_of_it(box):
    for _ in range(25):
        press(box, "s")
    box.buttons["apply"].click()
    assert "25 changed" in box.html["status"].value and (box.review.run.path / "mended.csv").exists()
    box.buttons["train"].click()
    assert "estimated share of wrong labels" in box.html["result"].value


def test_errors_are_shown_as_text(box):
    box.review.corrections.path = Path(box.review.run.path / EVIL / "corrections.csv")
    press(box, "k")
    assert 'role="alert"' in box.html["status"].value and "<img" not in box.html["status"].value


def test_what_is_sent_is_text_for_the_browser_to_show_as_text():
    """The script of the page makes no HTML of anything; the style sheet takes JupyterLab's colours."""
    script = (panel.FOLDER / "review.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    assert panel.style().count("var(--jp-") >= 4 and "image-rendering: pixelated" in panel.style()
