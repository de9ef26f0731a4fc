"""The explorer: every image a point to zoom and lasso, the pictures behind the points, and a sweep's stored runs.

Widgets in JupyterLab, a still picture elsewhere. Whatever comes from data is escaped where it becomes HTML. ipywidgets
and jscatter are imported where they are used. Every part that can be seen has a class that begins with `ptglab-`.
"""

import functools
import threading
import warnings
from html import escape
from types import SimpleNamespace

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ptglab.audit import exports
from ptglab.audit.reopen import Findings
from ptglab.detect import neighbours
from ptglab.errors import InputError, one_of
from ptglab.lab import figures, live, metrics, runs, tables
from ptglab.ui import review
from ptglab.ui.stored import Stored

PAGE, STILL, SIDE = 60, 20, 64  # thumbnails a page of the gallery, and in a still picture; pixels a side
MARGIN = 1.1  # of what the scatter shows to what the points take up
MOST_NAMED = 30  # classes that the legend lists
GREY = "#999999"
COLOURS = {"given": "given label", "true": "true label", "score": "score", "flag": "flag"}
CURVES = {"accuracy_test": "test images", "learned_right": "right labels", "learned_wrong": "wrong labels"}
HELP = (
    "<b>Drag</b> around points to select them (lasso), <b>click</b> one to select it, <b>double-click</b> to let go. "
    "The <b>wheel</b> zooms; the buttons beside the points pan and reset. Hover over a point to see its picture."
)


def embedding(run: runs.Run, features: np.ndarray, seed: int) -> np.ndarray:
    """Return UMAP coordinates float32 [N, 2] of `features` [N, D], kept in `run` as the array `embedding`.

    Raises InputError if the array that is kept is of another number of images.
    """
    if not (run.path / "arrays" / "embedding.npy").exists():
        run.save_array("embedding", neighbours.embedding(features, seed))
    kept = run.array("embedding")
    if kept.shape != (len(features), 2):
        raise InputError(f"{run.path} holds {len(kept)} embedded images, not {len(features)}: give another run_dir")
    return kept


class Explorer:
    """The images of `found` at their coordinates `xy`, float [N, 2]; show it as the last value of a cell.

    truth: the true labels, int64 [N], where they are known. stored: a sweep whose cells are of the same images, and
    choice: which of them `found` is, see Stored.cells; then there are sliders to choose others. Raises InputError if
    xy or truth are of other images.
    """

    def __init__(
        self, found: Findings, xy: np.ndarray, truth=None, stored: Stored | None = None, choice: dict | None = None
    ):
        if not len(found.images) == len(xy) == len(xy if truth is None else truth):
            raise InputError(f"{len(xy)} coordinates for {len(found.images)} images: they must be of the same run")
        self.xy, self.truth, self.stored, self.choice = np.asarray(xy, np.float32), truth, stored, choice
        self.names, self.by, self.selected, self.page, self.note = found.images.class_names, "given", None, 0, ""
        self._ids, self.worker, self._filling = found.images.ids, None, False
        self._show(found, found.detector)

    def _show(self, found: Findings, detector: str) -> None:
        if found.images.ids != self._ids:
            raise InputError(f"{found.folder} is of other images: give the sweep and this notebook the same parameters")
        self.found, self.images, self.page = found, found.images, 0
        self.detector = detector if detector in found.detectors else found.detector
        self.suspects = found.suspects(self.detector)

    @property
    def rows(self) -> np.ndarray:
        """The rows whose images the gallery shows, int64: the selected ones, or else the most suspicious."""
        return np.argsort(self.suspects.score, kind="stable")[:STILL] if self.selected is None else self.selected

    @property
    def pages(self) -> int:
        return max(1, -(-len(self.rows) // PAGE))

    @property
    def colours(self) -> list[str]:
        return [name for name in COLOURS if name != "true" or self.truth is not None]

    @property
    def missing(self) -> list:
        """The cells that the current choice needs and the sweep has not stored."""
        return self.stored.missing(**self.choice) if self.stored else []

    def select(self, rows) -> None:
        """Fill the gallery with exactly these rows, in order of the data set; with None, the most suspicious."""
        self.selected = np.unique(np.asarray(rows, np.int64)) if rows is not None and len(rows) else None
        self._refresh("selection")
        self.turn(0)

    def turn(self, page: int) -> None:
        """Show another page of the gallery."""
        self.page = min(max(0, page), self.pages - 1)
        self._refresh("gallery")

    def colour(self, by: str) -> None:
        """Colour the points by one of COLOURS. Raises InputError for another one, and where no truth is known."""
        self.by = one_of("colour", by, self.colours)
        self._refresh("scatter")

    def detect(self, detector: str) -> None:
        """Let another one of `found.detectors` judge the labels."""
        self._show(self.found, one_of("detector", detector, self.found.detectors))
        self._refresh("status", "scatter", "gallery")

    def choose(self, **choice) -> None:
        """Choose another `init`, `noise_kind` or `noise_rate`: shown at once if it is stored, and else `missing`."""
        self.choice = self.choice | choice
        if self.missing:
            return self._refresh("status")
        self._show(self.stored.read(**self.choice), self.detector)
        self._refresh("status", "curves", "detectors", "scatter", "gallery")

    def compute(self) -> None:
        """Compute what is missing of the current choice, nothing else, and show it. Raises InputError if it fails."""
        choice, time = self.choice, self._time()
        try:
            for done, whole, event in self.stored.compute(choice):
                self.note = f"{done} of {whole} done{time}; {event.state} {event.cell.name}"
                self._refresh("status", progress=done / whole)
        finally:
            self.note = ""
        self.choose(**(choice if choice == self.choice else {}))

    def _time(self) -> str:
        """Return in words how long what is missing will take; "" if that is unknown."""
        seconds = self.stored.seconds(**self.choice)
        return f", about {seconds:.0f} s" if seconds == seconds else ""

    def caption(self, row: int) -> str:
        """Return what is known of a row in words."""
        given, other = self.names[self.images.labels_given[row]], self.names[self.suspects.suggested[row]]
        true = "" if self.truth is None else f", true {self.names[self.truth[row]]}"
        flag = "flagged" if self.suspects.flagged[row] else "not flagged"
        return f"row {row}: given {given}, suggested {other}{true}, score {self.suspects.score[row]:.3g}, {flag}"

    def gallery(self, rows=None) -> str:
        """Return the thumbnails of `rows`, by default of the current page, as HTML; each has its row in `data-row`."""
        rows = self.rows[self.page * PAGE :][:PAGE] if rows is None else rows
        cards = []
        for row, picture in zip(rows, exports.thumbnails(self.images, rows, SIDE), strict=True):
            given, other = self.images.labels_given[row], self.suspects.suggested[row]
            flag = "⚑ " if self.suspects.flagged[row] else ""
            words = escape(flag + self.names[given] + (f" → {self.names[other]}" if other != given else ""))
            picture = review.image(review.address(picture), self.caption(row))
            cards.append(f'<div class="ptglab-card" data-row="{row}">{picture}<span>{words}</span></div>')
        return f'<div class="ptglab-page" role="group" aria-label="Images">{"".join(cards)}</div>'

    def heading(self) -> str:
        """Return in words what the gallery shows."""
        if self.selected is None:
            return f"The {len(self.rows)} most suspicious to {self.detector}: given → suggested, ⚑ flagged"
        pages = f", page {self.page + 1} of {self.pages}" if self.pages > 1 else ""
        return f"{len(self.rows):,} selected{pages}: given → suggested, ⚑ flagged"

    def large(self, row: int) -> str:
        """Return one image with what is known of it, as HTML."""
        picture = review.address(exports.thumbnails(self.images, [row], 256)[0])
        about = escape(self.caption(row)).replace(", ", "<br>").replace(": ", "<br>", 1)
        return f'<figure class="ptglab-hover">{review.image(picture, self.caption(row))}<figcaption>{about}</figure>'

    def _classes(self) -> tuple[np.ndarray, dict[str, str]]:
        """Return (the class of each point, int64 [N], {name: colour} of the classes), where points are of classes."""
        if self.by == "flag":
            return self.suspects.flagged.astype(np.int64), {"not flagged": GREY, "flagged": figures.WRONG}
        tints = map(to_hex, figures.class_colours(len(self.names)))
        return (self.images.labels_given if self.by == "given" else self.truth), dict(
            zip(self.names, tints, strict=True)
        )

    def legend(self) -> str:
        """Return what the colours of the points stand for, as HTML."""
        if self.by == "score":
            score, tints = self.suspects.score, [to_hex(colormaps["cividis"](step / 4)) for step in range(5)]
            bar = f'<div class="ptglab-scale" style="background: linear-gradient(to right, {", ".join(tints)})"></div>'
            return f"Score: low is suspicious{bar}<span>{score.min():.3g}</span><span>{score.max():.3g}</span>"
        lines = [f'<li><span style="color: {tint}">●</span> {escape(figures.short(name))}</li>'
                 for name, tint in list(self._classes()[1].items())[:MOST_NAMED]]  # fmt: skip
        return f'<ul class="ptglab-legend">{"".join(lines)}</ul>'

    def status(self) -> str:
        """Return in words whether the current choice is stored, and how well labels are found where that is known."""
        summary = "{init}, {noise_kind} noise of {noise_rate:.0%}: ".format(**self.choice) if self.choice else ""
        if self.note:
            return summary + self.note
        if self.missing:
            return f"{summary}not stored; {len(self.missing)} to execute{self._time()}. Below: what was shown before"
        summary += f"{self.suspects.flagged.sum():,} of {len(self.images):,} labels flagged by {self.detector}"
        if self.truth is not None:
            scores = metrics.detection(self.suspects, self.images.labels_given != self.truth)
            summary += f", F1 {scores['f1']:.2f}"
        return summary

    def curves(self) -> str:
        """Return the accuracy of the current choice, by epoch and by noise rate, as HTML; "" if it is not stored."""
        table = self.stored.curves(**self.choice) if self.stored else None
        if table is None:
            return ""
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        shown = {text: table[name] for name, text in CURVES.items() if table[name].notna().all()}
        figures.lines(left, {t: (table["epoch"], y) for t, y in shown.items()}, "epoch", "as labelled, %", percent=True)
        left.set_ylim(0, 102)
        lines, _ = tables.by_rate(self.stored.results(), "accuracy_last", self.choice["noise_kind"])
        figures.points(right, lines, f"{self.choice['noise_kind']} noise, nominal %", "test accuracy, last epoch, %")
        right.axvline(100 * self.choice["noise_rate"], color=figures.MUTED, linewidth=1, linestyle=":")
        alt = ", ".join(f"{text} {100 * y.iloc[-1]:.0f} %" for text, y in shown.items())
        return live.page(figure, "Curves of {init} at {noise_rate:.0%}".format(**self.choice) + f", last epoch: {alt}")

    def still(self) -> str:
        """Return everything as HTML without widgets: the embedding by label and flag, the curves, the suspects."""
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        given, true, flags = figure.subplots(1, 3)
        figures.embedding(given, self.xy, self.images.labels_given, self.names, "given labels")
        if self.truth is None:
            true.set_axis_off()
        else:
            figures.embedding(true, self.xy, self.truth, self.names, "true labels")
        figures.embedding_flags(flags, self.xy, self.suspects.flagged, f"flagged by {self.detector}")
        alt = f"{len(self.xy):,} images as points, by given label, true label and flag; {self.status()}"
        parts = f"<p>{escape(self.status())}</p>{live.page(figure, alt)}{self.curves()}<p>{escape(self.heading())}</p>"
        return f'{review.style()}<div class="ptglab-still">{parts}{self.gallery(self.rows[:STILL])}</div>'

    @functools.cached_property
    def widgets(self) -> SimpleNamespace:
        """The widgets by name, made when they are first asked for; `box` holds all of them."""
        import ipywidgets

        html, w = ipywidgets.HTML, SimpleNamespace(scatter=_scatter(self.xy))
        for name in ("line", "graph", "legend", "hover", "heading", "gallery"):
            setattr(w, name, html().add_class(f"ptglab-{name}-box"))
        points = w.scatter.widget.add_class("ptglab-scatter")
        points.observe(lambda change: self.select(change["new"]), "selection")
        points.observe(self._hovered, "hovering")
        w.by = ipywidgets.ToggleButtons(options=[(COLOURS[name], name) for name in self.colours])
        w.by.add_class("ptglab-by").observe(lambda change: self.colour(change["new"]), "value")
        w.detector = _slider("detector", self.found.detectors, self.detector)
        w.detector.observe(lambda change: self._filling or self.detect(change["new"]), "value")
        for name, text in [("before", "← page before"), ("after", "next page →"), ("compute", "Compute it")]:
            setattr(w, name, ipywidgets.Button(description=text).add_class(f"ptglab-{name}"))
        w.before.on_click(lambda _: self.turn(self.page - 1))
        w.after.on_click(lambda _: self.turn(self.page + 1))
        w.compute.on_click(self._start)
        w.bar, w.sliders = ipywidgets.FloatProgress(min=0, max=1), {}
        if self.stored:
            options = {"noise_rate": self.stored.rates, "noise_kind": self.stored.kinds, "init": self.stored.inits}
            w.sliders = {name: _slider(name, values, self.choice[name]) for name, values in options.items()}
            for name, slider in w.sliders.items():
                slider.observe(lambda change, name=name: self.choose(**{name: change["new"]}), "value")
        w.pages, row = ipywidgets.HBox([w.before, w.after]), ipywidgets.HBox([w.compute, w.bar])
        w.hover.value = "Hover over a point"
        side = ipywidgets.VBox([w.legend, w.hover]).add_class("ptglab-side")
        plot = ipywidgets.HBox([points, side]).add_class("ptglab-plot")
        parts = [*w.sliders.values(), w.detector, row, w.line, w.graph, html(HELP), w.by, plot, w.heading, w.pages]
        w.box = ipywidgets.VBox([html(review.style()), *parts, w.gallery])
        w.box.add_class("ptglab-still").add_class("ptglab-explorer")
        vars(self)["widgets"] = w  # what follows fills them
        self._refresh("status", "curves", "scatter", "gallery", "selection")
        return w

    def _refresh(self, *parts: str, progress: float = 0.0) -> None:
        """Bring these parts of the widgets up to date, if there are widgets."""
        if "widgets" not in vars(self):
            return
        w = self.widgets
        if "status" in parts:
            w.line.value, w.bar.value = escape(self.status()), progress
            w.bar.layout.display = "" if self.note else "none"
            w.compute.layout.display = "none" if self.note or not self.missing else ""
        if "curves" in parts:
            w.graph.value = self.curves() or w.graph.value
        if "gallery" in parts:
            w.heading.value, w.gallery.value = f"<b>{escape(self.heading())}</b>", self.gallery()
            w.before.disabled, w.after.disabled = self.page == 0, self.page + 1 >= self.pages
            w.pages.layout.display = "" if self.pages > 1 else "none"
        if "scatter" in parts:
            w.legend.value = self.legend()
            self._paint(w.scatter)
        if "selection" in parts:
            rows = [] if self.selected is None else self.selected
            if not np.array_equal(np.sort(w.scatter.widget.selection), rows):  # not what the browser itself has said
                w.scatter.selection(rows)
        if "detectors" in parts:
            self._filling = True  # a slider with other options is no choice that a person made
            w.detector.options, w.detector.value = self.found.detectors, self.detector
            self._filling = False

    def _paint(self, scatter) -> None:
        """Colour the points; flagged ones are larger, too, where flags are shown."""
        scatter.size(default=7)
        if self.by == "score":
            score = self.suspects.score
            scatter.color(by=score, map="cividis", norm=(score.min(), score.max()))
            return
        numbers, tints = self._classes()
        present = np.unique(numbers)  # a colour, or a size, for each of these
        points = pd.Categorical(numbers, present)
        scatter.color(by=points, map=np.array([*tints.values()])[present].tolist())
        if self.by == "flag":
            scatter.size(by=points, map=np.array([5, 9])[present].tolist())

    def _hovered(self, change: dict) -> None:
        if change["new"] is not None:  # the last picture stays
            self.widgets.hover.value = self.large(change["new"])

    def _start(self, _) -> None:
        """Compute what is missing in a thread of its own, so that the widgets go on answering meanwhile."""
        if self.worker is None or not self.worker.is_alive():
            self.worker = threading.Thread(target=self._work, daemon=True)
            self.worker.start()

    def _work(self) -> None:
        try:
            self.compute()
        except (InputError, OSError) as error:
            self._refresh("status")
            self.widgets.line.value = escape(str(error))

    def __repr__(self) -> str:
        return f"Explorer of {self.found.folder}: {self.status()}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        still = {"text/plain": repr(self), "text/html": self.still()}  # also for a reader without a kernel
        return (self.widgets.box._repr_mimebundle_(**kwargs) if live.interactive() else {}) | still


def _slider(name: str, values, value):
    import ipywidgets

    texts = [f"{v:.0%}" if name == "noise_rate" else str(v).replace("_", " ") for v in values]
    return ipywidgets.SelectionSlider(
        options=list(zip(texts, values, strict=True)), value=value, description=name.replace("_", " "),
        style={"description_width": "6em"}, layout={"width": "34em"},
    ).add_class(f"ptglab-{name.replace('_', '-')}")  # fmt: skip


def _scatter(xy: np.ndarray):
    """Return the scatter of all points, float [N, 2], in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pandas, at its import
        from jscatter import Scatter
    scatter = Scatter(data=pd.DataFrame(xy, columns=["x", "y"]), x="x", y="y", width=760, height=560)
    scatter.axes(False).tooltip(enable=False).mouse("lasso").camera(distance=MARGIN)
    return scatter if scatter.widget is None else scatter.opacity(default=0.85, unselected=0.12)
