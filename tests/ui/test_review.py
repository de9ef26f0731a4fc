"""The review of suspects: what is shown by which filter, what each button and key does; nothing that data brought is
HTML. What the browser sends is sent by hand."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from expected import refused
from reviewed import EVIL

from ptglab import data
from ptglab.audit import exports, reopen
from ptglab.detect import neighbours
from ptglab.detect.suspects import Suspects
from ptglab.lab import live, runs
from ptglab.ui import pages, review


@pytest.fixture
def desk(found, tmp_path) -> review.Review:
    return review.Review(found, runs.Run(tmp_path), size=10)


def made(number: int, names: list[str], ids: list[str] | None = None) -> reopen.Findings:
    """Return findings on `number` made-up images of classes `names`, all of them suspects, the first one most."""
    rng, k = np.random.default_rng(0), len(names)
    given = rng.integers(0, k, number)
    pixels = torch.from_numpy(rng.integers(0, 256, (number, 1, 8, 8), dtype=np.uint8))
    images = data.ImageSet(pixels, given, None, names, ids or [f"{i:06}.png" for i in range(number)])
    found = Suspects(np.linspace(0, 1, number, dtype=np.float32), np.ones(number, bool), (given + 1) % k)
    stored = {"probs": np.full((number, k), 1 / k, np.float32), "features": rng.random((number, 32), np.float32)}
    return reopen.Findings(Path("nowhere"), "digits", images, found, "confidence", stored)


class Tags(HTMLParser):
    """Collects the tags of some HTML, and what is in alt texts."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.alts = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        names = dict(attributes)
        assert not any(name.startswith("on") for name in names), names
        if tag == "img":
            assert names["src"].startswith("data:image/")
            self.alts.append(names["alt"])


def current(desk: review.Review) -> int:
    return desk.widgets.page.state["row"]


def press(desk: review.Review, *keys: str) -> None:
    for key in keys:
        desk.receive({"key": key, "row": current(desk)})


def decided(desk: review.Review) -> list[str]:
    return [d.decision for d in desk.corrections.rows]


def test_filters_leave_what_they_say_the_most_suspicious_first(desk, found):
    suspects, given = found.suspects("confidence"), found.images.labels_given
    order = np.argsort(suspects.score, kind="stable")
    assert desk.queue.rows.tolist() == [i for i in order if suspects.flagged[i]]
    assert desk.rows.tolist() == desk.queue.rows[:10].tolist()
    assert desk.queue.progress() == f"0 of {suspects.flagged.sum()}, 0 changed"
    text, pair = desk.widgets.filters["pair"].options[1]
    desk.filter(pair=pair)
    rows = desk.queue.rows
    assert (
        text.endswith(f" ({len(rows)})")
        and (given[rows] == pair[0]).all()
        and (suspects.suggested[rows] == pair[1]).all()
    )
    desk.filter(pair=(), range=(0.2, 0.4), only_flagged=False)
    assert set(desk.queue.rows) == set(np.flatnonzero((suspects.score >= 0.2) & (suspects.score <= 0.4)))
    desk.filter(range=None, detector="knn")
    assert desk.queue.rows.tolist() == np.argsort(found.suspects("knn").score, kind="stable").tolist()


def test_what_is_known_of_a_picture_is_shown(desk, found):
    row, names, facts = desk.queue.row, found.images.class_names, desk.facts()
    given, suggested = found.images.labels_given[row], found.suspects("confidence").suggested[row]
    for label in (given, suggested):
        assert f"<bdi>{label} ({found.probs[row, label]:.1%} probable)</bdi>" in facts
    assert "nothing yet" in facts and found.images.ids[row] in facts
    assert Tags(desk.widgets.picture.value).alts == [
        f"{found.images.ids[row]}, labelled {given}, suggested {suggested}"
    ]
    others = neighbours.nearest(found.features, 8)[1][row]
    assert row not in others and Tags(desk.similar()).alts == [desk.caption(i) for i in others]
    assert desk.decide("suggestion") == f"{found.images.ids[row]}: labelled {names[suggested]}"
    assert desk.corrections.rows[-1].label == names[suggested] and desk.mark(row) == f"→ {names[suggested]}"


def test_keys_are_the_digits_that_classes_are_called_or_their_places(desk, tmp_path):
    assert desk.numbers == {str(i): i for i in range(10)}
    for names, keys in [(["cat", "dog"], "12"), ([f"class {i}" for i in range(12)], "1234567890")]:
        other = review.Review(made(20, names), runs.Run(tmp_path))
        assert other.numbers == {key: number for number, key in enumerate(keys)}


def test_names_from_data_are_text_and_never_html(tmp_path):
    desk = review.Review(made(30, [EVIL, "dog"], [f"{EVIL}{i}" for i in range(30)]), runs.Run(tmp_path))
    desk.decide("suggestion")
    for html in (desk.facts(), desk.widgets.picture.value, desk.similar(), desk.still()):
        tags = Tags(html)
        assert "<img src=x" not in html and (any(EVIL in alt for alt in tags.alts) or "img" not in tags.tags)
        assert tags.tags <= set(re.findall(r"\w+", "dl div dt dd bdi img figure p span style"))
    assert EVIL in desk.cards()[0]["alt"] and EVIL in desk.cards()[0]["text"]  # the script sets them as text:
    script = (pages.STATIC / "review.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    desk.corrections.path = tmp_path / EVIL / "corrections.csv"
    press(desk, "k")  # an error is shown as text, too
    assert 'role="alert"' in desk.widgets.status.value and "<img" not in desk.widgets.status.value


def test_a_still_page_in_place_of_widgets_outside_jupyterlab(desk, monkeypatch):
    shown = desk._repr_mimebundle_()
    tags = Tags(shown["text/html"])
    assert set(shown) == {"text/plain", "text/html"} and "ipywidgets" not in shown["text/plain"]
    assert len(tags.alts) == 10 and desk.queue.progress() in shown["text/html"] and "script" not in tags.tags
    monkeypatch.setattr(live, "interactive", lambda: True)
    shown = desk._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown and "ptglab-still" in shown["text/html"]


def test_decisions_on_another_set_are_refused(desk, tmp_path):
    desk.decide("keep")
    refused("corrections.csv", call=review.Review)(made(20, ["a", "b"]), runs.Run(tmp_path))


@pytest.mark.parametrize(
    ("name", "key", "decision"),
    [
        ("keep", "k", "keep"), ("suggest", "s", "suggestion"), ("suggest", "enter", "suggestion"),
        ("drop", "d", "drop"), ("skip", "space", "skip"), ("choose", "7", "class"),
    ],
)  # fmt: skip
def test_buttons_and_keys_decide_alike(desk, name, key, decision):
    desk.widgets.list.value = 7
    desk.widgets.buttons[name].click()
    press(desk, key)
    assert decided(desk) == [decision] * 2
    assert desk.widgets.progress.value.startswith('<span aria-live="polite">2 of ')
    if decision == "class":
        assert [row.label for row in desk.corrections.rows] == ["7", "7"]


def test_a_decision_is_on_disk_before_the_next_picture_shows(desk, monkeypatch):
    assert desk.widgets.page.cards
    on_disk, show, path = [], desk.show, desk.corrections.path
    monkeypatch.setattr(desk, "show", lambda: (on_disk.append(path.read_text().count("\n")), show()))
    press(desk, "k", "d")
    assert on_disk == [2, 3]


def test_a_key_for_an_earlier_picture_decides_nothing(desk):
    first = current(desk)
    press(desk, "k")
    for key in ("k", "3"):
        desk.receive({"key": key, "row": first})
    press(desk, "x", "apply now", "go", None)  # no key means these
    assert decided(desk) == ["keep"]
    desk.receive({"key": "u", "row": first})  # undo needs no picture
    assert decided(desk) == [] and current(desk) == first


def test_moving_turns_pages_and_keeps_within_them(desk):
    rows = desk.queue.rows
    for key, place in [("arrowleft", 0), ("arrowright", 1), ("arrowdown", 11), ("arrowup", 1), ("arrowup", 0)]:
        press(desk, key)
        assert current(desk) == rows[place] and desk.widgets.page.state["place"] == place % 10, key
    press(desk, *["arrowdown"] * 20)
    assert current(desk) == rows[-1] and re.fullmatch(r"page (\d+) of \1", desk.widgets.pages.value)
    assert decided(desk) == []


def test_a_card_is_gone_to_and_marked_once_decided(desk):
    page, cards = desk.widgets.page, desk.widgets.page.cards
    desk.receive({"go": 4, "row": current(desk)})
    assert page.state["place"] == 4 and page.state["row"] == desk.queue.rows[4]
    press(desk, "n")
    assert desk.widgets.similar.value.count("<figure") == 8
    press(desk, "d")
    assert page.state["marks"][3:5] == ["", "dropped"] and page.state["place"] == 5
    assert page.cards is cards and desk.widgets.similar.value == ""  # the page's pictures are not made again


def test_filters_choose_and_count(desk):
    filters, queue, widgets = desk.widgets.filters, desk.queue, desk.widgets
    filters["pair"].value = desk.widgets.filters["pair"].options[1][1]
    filters["detector"].value = "knn"
    assert filters["pair"].value == () and desk.detector == "knn"
    total, ends = queue.chosen.sum(), (filters["range"].min, filters["range"].max)
    filters["range"].value = (ends[0], float(np.median(desk.suspects.score[queue.rows])))
    assert 0 < queue.chosen.sum() < total
    filters["range"].value = ends
    filters["only_flagged"].value = False
    assert queue.chosen.sum() == 200
    press(desk, "k")
    filters["state"].value = "skipped"
    assert current(desk) == -1 and widgets.page.cards == [] and "No suspect fits" in widgets.facts.value
    press(desk, "k")
    assert 'role="alert"' in widgets.status.value and "nothing to decide" in widgets.status.value


def test_apply_and_train_show_what_came_of_it(desk, tmp_path):
    press(desk, *["s"] * 25, "d")
    desk.widgets.buttons["apply"].click()
    assert "25 changed, 1 dropped" in desk.widgets.status.value and (tmp_path / "mended.csv").exists()
    desk.widgets.buttons["train"].click()
    assert "estimated share of wrong labels" in desk.widgets.result.value
    noise = desk.train().loc["estimated share of wrong labels, confident joint"]
    assert noise["after"] < noise["before"] - 5


def test_of_many_suspects_only_a_page_of_pictures_is_made(tmp_path, monkeypatch):
    pictures, thumbnails = [], exports.thumbnails
    monkeypatch.setattr(exports, "thumbnails", lambda images, rows, side: (
        pictures.append(len(rows)), thumbnails(images, rows, side))[1])  # fmt: skip
    desk = review.Review(made(100_000, [f"class {i}" for i in range(10)]), runs.Run(tmp_path))
    assert len(desk.widgets.page.cards) == 24 and sorted(pictures) == [1, 24]
    for _ in range(5):
        desk.act("suggest")
    assert sorted(pictures) == [1] * 6 + [24] and desk.queue.progress() == "5 of 100,000, 5 changed"
