"""The explorer's widgets: what the browser sends of lasso, click, hover and sliders, and what it is shown then."""

import re

import numpy as np
from expected import refused
from explored import CHOICE, KIND, shown

from ptglab.data import noise
from ptglab.detect import label_errors
from ptglab.ui import explorer


def test_lasso_click_and_double_click_of_the_browser(opened):
    widgets = opened.widgets

    def send(rows: list[int] | None) -> None:
        """Send what the browser sends of a lasso, a click or a double click."""
        widgets.ear._handle_custom_msg({"rows": rows}, [])

    inside = np.flatnonzero((opened.truth == 4) & (np.arange(150) < 90)).tolist()
    send(inside)
    assert len(inside) > 3 and shown(widgets.cards.value) == inside
    assert list(widgets.figure.data[0].selectedpoints) == inside
    send([])  # as plotly says when the outline is taken away
    assert shown(widgets.cards.value) == inside and list(widgets.figure.data[0].selectedpoints) == inside
    send([41])
    assert shown(widgets.cards.value) == [41]
    send(None)
    assert len(shown(widgets.cards.value)) == explorer.STILL and widgets.figure.data[0].selectedpoints is None


def test_hovering_shows_the_picture(opened):
    points = {"trace_indexes": [0], "point_indexes": [17], "xs": [0], "ys": [0]}
    event = {"event_type": "plotly_hover", "points": points, "selector": None, "device_state": None}
    opened.widgets.figure._js2py_pointsCallback = event  # the message that it arrives by
    assert 'alt="row 17: given' in opened.widgets.hover.value


def test_colours_say_what_they_stand_for(opened):
    widgets, points = opened.widgets, opened.widgets.figure.data[0]
    legend = re.findall(r'<li><span style="color: (#......)">.</span> (.)</li>', widgets.legend.value)
    assert [name for _, name in legend] == list("0123456789")
    colour = dict(zip(opened.images.labels_given, points.marker.color, strict=True))
    assert [colour[label] for label in opened.images.labels_given] == list(points.marker.color)
    assert [colour[int(name)] for _, name in legend] == [tint for tint, _ in legend] == [*dict(legend)]
    widgets.by.value = "true"
    assert len({(c, t) for c, t in zip(points.marker.color, opened.truth, strict=True)}) == 10
    widgets.by.value = "flag"
    assert ((np.array(points.marker.symbol) == "x") == opened.suspects.flagged).all()
    widgets.by.value = "score"
    assert np.allclose(np.array(points.marker.color, float), opened.suspects.score) and points.marker.showscale
    refused("colour 'flga'", "did you mean 'flag'", call=opened.colour)("flga")


def test_the_detector_slider_judges_anew(opened):
    assert {"disagreement", "confident_learning"} <= set(opened.found.detectors)
    opened.widgets.detector.value = "confident_learning"
    expected = label_errors.detect("confident_learning", opened.images.labels_given, opened.found.stored["probs"])
    assert (opened.suspects.score == expected.score).all() and "confident_learning" in opened.widgets.line.value


def test_what_is_stored_is_shown_and_only_what_is_missing_is_computed(swept):
    opened, executed = swept
    widgets = opened.widgets
    before = widgets.graph.value, opened.images.labels_given
    assert widgets.button.layout.display == "none" and "F1 1.00" in widgets.line.value
    rate = next(child for child in widgets.box.children if "ptglab-rate" in child._dom_classes)
    rate.value = 0.6
    assert "not stored; 1 to execute" in widgets.line.value and widgets.button.layout.display == ""
    assert (widgets.graph.value, opened.images.labels_given) == before and not executed
    widgets.button.click()
    widgets.worker.join(60)
    assert executed == [opened.stored.cells(**CHOICE | {"noise_rate": 0.6})[-1].name]  # its pre-training was stored
    truth, given = opened.truth, opened.images.labels_given
    assert (given == noise.apply(KIND, truth, 0.6, 10, 0)).all() and (given != before[1]).any()
    assert widgets.graph.value != before[0] and 'data-row="' in widgets.cards.value
    rate.value = 0.4
    assert (opened.images.labels_given == before[1]).all() and len(executed) == 1 and not opened.missing
