"""The explorer: a selection fills the gallery with exactly those rows, stored runs are shown at once."""

import re
import threading

import numpy as np
import pytest
from expected import refused
from explored import CHOICE, FAILS, KIND, found_in, shown

from ptglab import data
from ptglab.data import noise
from ptglab.detect import label_errors, neighbours
from ptglab.errors import InputError
from ptglab.lab import live, runs, sweeps
from ptglab.ui import explorer


def test_a_selection_fills_the_gallery_with_exactly_those(opened):
    opened.select([7, 3, 100, 7])
    assert shown(opened.gallery()) == [3, 7, 100] and opened.heading().startswith("3 selected")
    opened.select(None)
    assert shown(opened.gallery()) == np.argsort(opened.suspects.score, kind="stable")[: explorer.STILL].tolist()
    opened.select(range(130))
    seen = []
    for page in range(opened.page_count):
        opened.turn(page)
        seen += shown(opened.gallery())
    assert opened.page_count == 3 and seen == list(range(130))


def test_lasso_hover_and_buttons_of_the_widgets(opened):
    widgets, points = opened.widgets, opened.widgets.scatter.widget
    inside = np.flatnonzero((opened.truth == 4) & (np.arange(150) < 90))
    points.selection = inside[::-1].astype(np.uint32)  # as the browser sets it, in its own order
    assert len(inside) > 3 and shown(widgets.gallery.value) == inside.tolist()
    widgets.by.value = "score"
    assert set(points.selection) == set(inside)  # another colour keeps it
    points.selection = np.array([], np.uint32)  # a double-click
    assert len(shown(widgets.gallery.value)) == explorer.STILL
    opened.select(range(100))
    assert points.selection.tolist() == list(range(100)) and widgets.before.disabled
    widgets.after.click()
    assert shown(widgets.gallery.value) == list(range(60, 100)) and widgets.after.disabled
    points.hovering = 17
    assert 'alt="row 17: given' in widgets.hover.value
    points.hovering = None  # the last picture stays


def test_colours_say_what_they_stand_for(opened):
    widgets, points = opened.widgets, opened.widgets.scatter.widget

    def seen() -> list[tuple[int, ...]]:
        """Return the colour of each point, eight bits a channel."""
        return [tuple(round(255 * part) for part in points.color[int(code)][:3]) for code in points.points[:, 2]]

    def legend() -> dict[str, tuple[int, ...]]:
        found = re.findall(r'<li><span style="color: #(\w{6})">.</span> ([^<]*)</li>', widgets.legend.value)
        return {name: tuple(bytes.fromhex(tint)) for tint, name in found}

    for by, labels in [("given", opened.images.labels_given), ("true", opened.truth)]:
        widgets.by.value = by
        assert seen() == [legend()[opened.names[label]] for label in labels] and len(set(legend().values())) == 10
    widgets.by.value = "flag"
    assert seen() == [legend()["flagged" if flag else "not flagged"] for flag in opened.suspects.flagged]
    assert legend()["flagged"] == tuple(bytes.fromhex(explorer.figures.WRONG[1:])) and points.size_by is not None
    widgets.by.value = "score"
    score = opened.suspects.score
    assert np.allclose(points.points[:, 2], (score - score.min()) / np.ptp(score), atol=1e-6) and points.size_by is None
    refused("flga", "flag", call=opened.colour)("flga")


def test_without_the_truth_nothing_tells_of_it(tmp_path, images):
    found, _ = found_in(tmp_path / "one", images)
    blind = explorer.Explorer(found, np.zeros((150, 2)))
    assert (
        list(blind.colours) == ["given", "score", "flag"]
        and "true" not in blind.caption(0)
        and "F1" not in blind.status()
    )
    refused("9", "150", call=explorer.Explorer)(found, np.zeros((9, 2)))


def test_names_from_data_are_text(opened):
    opened.names = ["<script>alert(1)</script>", *opened.names[1:]]
    opened.select(np.flatnonzero(opened.truth == 0))
    opened.widgets.scatter.widget.hovering = int(opened.rows[0])
    widgets = opened.widgets
    page = opened.still() + widgets.hover.value + widgets.gallery.value + widgets.legend.value + widgets.line.value
    assert "<script>" not in page and page.count("&lt;script&gt;") > 3


def test_a_still_page_in_place_of_widgets_outside_jupyterlab(opened, monkeypatch):
    page = opened.still()
    assert len(shown(page)) == explorer.STILL
    assert page.count("<img") == page.count('alt="') == explorer.STILL + 1 and 'alt=""' not in page
    assert set(opened._repr_mimebundle_()) == {"text/plain", "text/html"}
    monkeypatch.setattr(live, "interactive", lambda: True)
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} < set(opened._repr_mimebundle_())


def test_the_embedding_is_computed_once_and_kept(tmp_path, monkeypatch):
    run, features, calls = runs.start(tmp_path / "run"), np.eye(60, 5, dtype=np.float32), []
    monkeypatch.setattr(neighbours, "embedding", lambda features, seed: calls.append(seed) or features[:, :2] + 1)
    for _ in range(2):
        assert (explorer.embedding(run, features, 7) == features[:, :2] + 1).all() and calls == [7]
    refused("60", "not 59", call=explorer.embedding)(run, features[:59], 0)


def test_the_detector_slider_judges_anew(opened):
    assert {"disagreement", "confident_learning"} <= set(opened.found.detectors)
    opened.widgets.detector.value = "confident_learning"
    expected = label_errors.detect("confident_learning", opened.images.labels_given, opened.found.stored["probs"])
    assert (opened.suspects.score == expected.score).all() and "confident_learning" in opened.widgets.line.value


def test_what_is_stored_is_shown_and_only_what_is_missing_is_computed(swept):
    opened, executed = swept
    widgets, rate = opened.widgets, opened.widgets.sliders["noise_rate"]
    before = widgets.graph.value, opened.images.labels_given
    assert widgets.compute.layout.display == "none" and "F1 1.00" in widgets.line.value
    opened.select([5, 6])
    rate.value = 0.6
    assert "not stored; 1 to execute" in widgets.line.value and widgets.compute.layout.display == ""
    assert (widgets.graph.value, opened.images.labels_given) == before and not executed
    widgets.compute.click()
    opened.worker.join(120)
    assert executed == [opened.stored.cells(**CHOICE | {"noise_rate": 0.6})[-1].name]  # its pre-training was stored
    given = opened.images.labels_given
    assert (given == noise.apply(KIND, opened.truth, 0.6, 10, 0)).all() and (given != before[1]).any()
    assert widgets.graph.value != before[0] and shown(widgets.gallery.value) == [5, 6]  # the selection stays
    rate.value = 0.4
    assert (opened.images.labels_given == before[1]).all() and len(executed) == 1 and not opened.missing


def test_the_widgets_answer_while_something_is_computed(swept, monkeypatch):
    opened, executed = swept
    run, computing, goes_on = sweeps.run, threading.Event(), threading.Event()

    def blocked(*args, **kwargs):
        for event in run(*args, **kwargs):
            yield event
            if event.state == "started":
                computing.set()
                assert goes_on.wait(300)

    monkeypatch.setattr(sweeps, "run", blocked)
    widgets = opened.widgets
    widgets.sliders["noise_kind"].value = "asymmetric"
    widgets.compute.click()
    assert computing.wait(300)
    widgets.compute.click()  # nothing is begun twice
    widgets.scatter.widget.selection = np.array([3, 9], np.uint32)
    assert shown(widgets.gallery.value) == [3, 9]
    widgets.sliders["noise_kind"].value = KIND  # what is stored is shown, and stays when the other is done
    goes_on.set()
    opened.worker.join(120)
    assert len(executed) == 1 and opened.choice == CHOICE and not opened.note
    assert "uniform" in widgets.line.value and widgets.bar.layout.display == "none"


def test_a_cell_that_fails_says_so_in_a_line(swept):
    opened, _ = swept
    opened.choose(noise_rate=FAILS)
    with pytest.raises(InputError, match=r"cells/.*made to fail"):
        opened.compute()
    opened.widgets.compute.click()
    opened.worker.join(120)
    assert "made to fail" in opened.widgets.line.value and opened.widgets.compute.layout.display == ""


def test_other_images_are_refused(swept, tmp_path):
    opened, _ = swept
    found, _ = found_in(tmp_path / "other", data.load("digits").subset(100, seed=0))
    opened.stored.read = lambda **choice: found
    refused("other images", call=opened.choose)(noise_rate=0.4)
