"""The widgets of the explorer: sliders, a scatter to zoom and lasso, a gallery over what `explorer.Explorer` does.

ipywidgets and plotly are imported where they are used. Everything in sight has a class that begins with `ptglab-`.
"""

import functools
import math
import threading
import time
from html import escape
from pathlib import Path

import numpy as np

from ptglab.errors import InputError
from ptglab.lab import figures
from ptglab.ui import panel

MOST_SVG = 20_000  # points up to which none is drawn by WebGL, which not every browser has, and each says what it is
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "cross": "✚", "x": "✖", "triangle-up": "▲",
           "triangle-down": "▼", "star": "★", "pentagon": "⬟", "hexagram": "✶"}  # fmt: skip
MOST_NAMED = 30  # classes that a legend lists
GREY = "#999999"
COLOURS = {"given": "given label", "true": "true label", "score": "score", "flag": "flag"}
HELP = (
    "<b>Drag</b> around points to select them (lasso), <b>click</b> one to select it, <b>double-click</b> to let go. "
    "The <b>wheel</b> zooms; the buttons above the points pan, zoom and reset. Hover over a point to see its picture."
)


@functools.cache
def _ear_widget() -> type:
    """Return the class of the widget that tells of selections in the scatter beside it, each of them."""
    import anywidget

    class Ear(anywidget.AnyWidget):
        _esm = (Path(__file__).parent / "static" / "lasso.js").read_text(encoding="utf-8")

    return Ear


class Widgets:
    """What is shown of an explorer: `box`; `parts` are functions that bring a part of it up to date."""

    def __init__(self, explorer):
        import ipywidgets

        self.explorer, self.filling, self.worker = explorer, False, None
        self.parts = {"status": self.status, "curves": self.curves, "detectors": self.detectors,
                      "scatter": self.scatter, "picked": self.picked, "gallery": self.gallery}  # fmt: skip
        html = ipywidgets.HTML
        self.line, self.graph, self.hover = html(), html().add_class("ptglab-graph"), html("Hover over a point")
        self.legend, self.head, self.cards = html(), html(), html().add_class("ptglab-gallery")
        self.figure = _figure(explorer.plane)
        points = self.figure.data[0]
        self.ear = _ear_widget()()
        self.ear.on_msg(lambda _, content, buffers: self.selected(content["rows"]))
        points.on_hover(lambda trace, points, state: self.hovered(points.point_inds))
        self.by = ipywidgets.ToggleButtons(options=[(COLOURS[name], name) for name in explorer.colours])
        self.by.observe(lambda change: explorer.colour(change["new"]), "value")
        self.detector = _slider("detector", explorer.found.detectors, explorer.detector)
        self.detector.observe(lambda change: self.filling or explorer.detect(change["new"]), "value")
        self.before, self.after = (ipywidgets.Button(description=text) for text in ("← page before", "next page →"))
        self.before.on_click(lambda _: self.turned(-1))
        self.after.on_click(lambda _: self.turned(+1))
        side = ipywidgets.VBox([self.legend, self.hover]).add_class("ptglab-side")
        scatter = ipywidgets.HBox([self.figure.add_class("ptglab-scatter"), side], layout={"flex_flow": "row wrap"})
        pages = ipywidgets.HBox([self.before.add_class("ptglab-before"), self.after.add_class("ptglab-after")])
        self.box = ipywidgets.VBox([
            html(f"<style>{panel.style()}</style>"), *self.sliders(), self.detector, self.line, self.graph,
            html(HELP), self.by.add_class("ptglab-colour"), scatter, self.ear, self.head, pages, self.cards,
        ])  # fmt: skip
        self.pages = pages
        for name in ("ptglab-still", "ptglab-explorer"):
            self.box.add_class(name)
        for draw in self.parts.values():
            draw()

    def sliders(self) -> list:
        """Return the sliders of a sweep, the button that computes what is missing, and its bar."""
        import ipywidgets

        stored, choice = self.explorer.stored, self.explorer.choice
        self.button = ipywidgets.Button(description="Compute it", icon="play").add_class("ptglab-compute")
        self.bar = ipywidgets.FloatProgress(value=0, min=0, max=1).add_class("ptglab-bar")
        self.button.on_click(lambda _: self.compute())
        if stored is None:
            return []
        options = {"noise_rate": stored.rates, "noise_kind": stored.kinds, "init": stored.inits}
        made = {name: _slider(name, values, choice[name]) for name, values in options.items()}
        for name, slider in made.items():
            slider.observe(lambda change, name=name: self.explorer.choose(**{name: change["new"]}), "value")
        return [*made.values(), ipywidgets.HBox([self.button, self.bar])]

    def selected(self, rows: list[int] | None) -> None:
        """Select what the browser says. Nothing, of a lasso around nothing or taken away, leaves what is selected."""
        if rows is not None and not len(rows):
            return self.picked()
        # The outline would lie between the mouse and the points in it, and select them again at any redrawing. The
        # kernel's figure does not know of it, so that setting it to nothing would be no change, and not be sent.
        self.figure._send_relayout_msg({"selections": []})
        self.explorer.select(rows)

    def hovered(self, rows: list[int]) -> None:
        if rows:
            self.hover.value = self.explorer.large(rows[0])

    def turned(self, by: int) -> None:
        self.explorer.page = min(max(0, self.explorer.page + by), self.explorer.pages - 1)
        self.gallery()

    def compute(self) -> None:
        """Compute what is missing in a thread of its own, so that the widgets go on answering meanwhile."""
        if self.worker is None or not self.worker.is_alive():
            self.worker = threading.Thread(target=self._work, daemon=True)
            seconds = self.explorer.stored.seconds(**self.explorer.choice)
            self.worker.start()
            threading.Thread(target=self._tick, args=(self.worker, seconds), daemon=True).start()

    def _tick(self, worker: threading.Thread, seconds: float) -> None:
        """Move the bar as time goes by, up to nearly its end, while one execution gives no news."""
        began = time.monotonic()
        while worker.is_alive():
            worker.join(0.5)
            self.bar.value = max(self.bar.value, min(0.95, (time.monotonic() - began) / (seconds or math.inf)))

    def _work(self) -> None:
        try:
            self.explorer.compute()
        except InputError as error:
            self.explorer.note = ""
            self.status()
            self.line.value = escape(str(error))

    def status(self, progress: float = 0.0) -> None:
        explorer = self.explorer
        busy = bool(explorer.note)
        self.line.value, self.bar.value = escape(explorer.status()), max(progress, self.bar.value * busy)
        self.button.layout.display = "none" if busy or not explorer.missing else ""
        self.bar.layout.display = "" if busy else "none"

    def curves(self) -> None:
        self.graph.value = self.explorer.curves() or self.graph.value

    def detectors(self) -> None:
        self.filling = True  # a slider with other options is not a choice that anybody made
        self.detector.options = self.explorer.found.detectors
        self.detector.value = self.explorer.detector
        self.filling = False

    def gallery(self) -> None:
        explorer = self.explorer
        self.head.value, self.cards.value = f"<b>{escape(explorer.heading())}</b>", explorer.gallery()
        self.before.disabled, self.after.disabled = explorer.page == 0, explorer.page + 1 >= explorer.pages
        self.pages.layout.display = "" if explorer.pages > 1 else "none"

    def picked(self) -> None:
        rows = self.explorer.selected
        self.figure.data[0].selectedpoints = None if rows is None else rows.tolist()

    def scatter(self) -> None:
        explorer, names = self.explorer, self.explorer.names
        points = self.figure.data[0]
        score, flagged = explorer.suspects.score, explorer.suspects.flagged
        with self.figure.batch_update():
            if explorer.by == "score":
                bar = {"title": {"text": "score, low = suspicious", "side": "right"}, "thickness": 12}
                points.update(marker=_marker(score, "circle") | {"colorbar": bar, "showscale": True})
                shown = {}
            elif explorer.by == "flag":
                colours, symbols = np.where(flagged, figures.WRONG, GREY), np.where(flagged, "x", "circle")
                points.update(marker=_marker(colours, symbols))
                shown = {"flagged": (figures.WRONG, "x"), "not flagged": (GREY, "circle")}
            else:
                labels = explorer.images.labels_given if explorer.by == "given" else explorer.truth
                tints, symbols = _tints(len(names)), np.resize(list(SYMBOLS), len(names))
                points.update(marker=_marker(np.array(tints)[labels], symbols[labels]))
                shown = dict(zip(names, zip(tints, symbols, strict=True), strict=True))
            if len(score) <= MOST_SVG:
                points.text = [escape(explorer.caption(row)).replace(": ", "<br>", 1) for row in range(len(score))]
        lines = [f'<li><span style="color: {tint}">{SYMBOLS[symbol]}</span> {escape(figures.short(name))}</li>'
                 for name, (tint, symbol) in list(shown.items())[:MOST_NAMED]]  # fmt: skip
        self.legend.value = f'<ul class="ptglab-legend">{"".join(lines)}</ul>'


def _slider(name: str, values, value):
    import ipywidgets

    texts = [f"{v:.0%}" if name == "noise_rate" else str(v).replace("_", " ") for v in values]
    slider = ipywidgets.SelectionSlider(
        options=list(zip(texts, values, strict=True)), value=value, description=name.replace("_", " "),
        style={"description_width": "6em"}, layout={"width": "34em"},
    )  # fmt: skip
    return slider.add_class("ptglab-slider").add_class(f"ptglab-{name.removeprefix('noise_')}")


def _figure(plane: np.ndarray):
    """Return the scatter of `plane`: one trace of all points, in order."""
    from plotly import graph_objects

    x, y = np.asarray(plane, np.float32).T
    few = len(x) <= MOST_SVG
    draw = graph_objects.Scatter if few else graph_objects.Scattergl
    faint = {"marker": {"opacity": 0.12}}
    points = draw(x=x, y=y, mode="markers", showlegend=False, unselected=faint, hoverinfo="text" if few else "none")
    bare, clear = {"visible": False}, "rgba(0, 0, 0, 0)"
    figure = graph_objects.FigureWidget([points])
    figure.update_layout(
        width=760, height=560, margin={"l": 0, "r": 0, "t": 30, "b": 0}, xaxis=bare, yaxis=bare, dragmode="lasso",
        paper_bgcolor=clear, plot_bgcolor=clear, font={"size": 15, "color": figures.MUTED}, hovermode="closest",
    )  # fmt: skip
    figure._config = figure._config | {"scrollZoom": True, "displaylogo": False, "displayModeBar": True}
    return figure


def _marker(colour: np.ndarray, symbol) -> dict:
    symbol = symbol if isinstance(symbol, str) else [str(s) for s in symbol]
    colour = colour if colour.dtype.kind == "f" else [str(c) for c in colour]
    return {"color": colour, "symbol": symbol, "size": 7, "opacity": 0.85, "colorscale": "Cividis", "showscale": False}


def _tints(number: int) -> list[str]:
    from matplotlib.colors import to_hex

    return [to_hex(tint) for tint in figures.class_colours(number)]
