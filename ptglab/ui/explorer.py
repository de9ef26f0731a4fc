"""The explorer: every image a point to zoom and lasso, the pictures behind the points, and a sweep's stored runs.

Widgets in JupyterLab, a still picture elsewhere. ipywidgets and jscatter are imported where they are used.
"""

import functools
import threading
import warnings
from html import escape
from types import SimpleNamespace

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ptglab.audit.reopen import Findings
from ptglab.detect import neighbours
from ptglab.errors import InputError, one_of
from ptglab.lab import figures, live, metrics, runs, tables
from ptglab.ui import pages

PAGE, STILL = 60, 20  # thumbnails a page of the gallery, and in a still picture
SMALL, LARGE = 64, 256  # pixels a side of a thumbnail, and of the picture of a point that the mouse is over
MARGIN = 1.1  # of what the scatter shows to what the points take up
MOST_NAMED = 30  # classes that the legend lists
COLOURS = {"given": "given label", "true": "true label", "score": "score", "flag": "flag"}
CURVES = {"accuracy_test": "test images", "learned_right": "right labels", "learned_wrong": "wrong labels"}


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

    truth: the true labels, int64 [N], where they are known. stored: the Stored of a sweep whose cells are of the same
    images, and choice: which of them `found` is, see Stored.cells; then there are sliders to choose others. Raises
    InputError if xy or truth are of other images.
    """

    def __init__(self, found: Findings, xy: np.ndarray, truth=None, stored=None, choice=None):
        if not len(found.images) == len(xy) == len(xy if truth is None else truth):
            raise InputError(f"{len(xy)} coordinates for {len(found.images)} images: they must be of the same run")
        self.xy, self.truth, self.stored, self.choice = np.asarray(xy, np.float32), truth, stored, choice
        self.ids, self.names, self.colours = found.images.ids, found.images.class_names, dict(COLOURS)
        if truth is None:
            del self.colours["true"]
        self.by, self.selected, self.page, self.note, self.worker = "given", None, 0, "", None
        self._show(found, found.detector)

    def _show(self, found: Findings, detector: str) -> None:
        if found.images.ids != self.ids:
            raise InputError(f"{found.folder} is of other images: give the sweep and this notebook the same parameters")
        self.found, self.images, self.page = found, found.images, 0
        self.detector = detector if detector in found.detectors else found.detector
        self.suspects = found.suspects(self.detector)

    @property
    def rows(self) -> np.ndarray:
        """The rows whose images the gallery shows, int64: the selected ones, or else the most suspicious."""
        return np.argsort(self.suspects.score, kind="stable")[:STILL] if self.selected is None else self.selected

    @property
    def page_count(self) -> int:
        return max(1, -(-len(self.rows) // PAGE))

    @property
    def missing(self) -> list:
        """The cells that the current choice needs and the sweep has not stored."""
        return self.stored.missing(**self.choice) if self.stored else []

    def select(self, rows) -> None:
        """Fill the gallery with exactly these rows, in order of the data set; with None, the most suspicious."""
        self.selected = np.unique(np.asarray(rows, np.int64)) if rows is not None and len(rows) else None
        self.turn(0)

    def turn(self, page: int) -> None:
        """Show another page of the gallery."""
        self.page = min(max(0, page), self.page_count - 1)
        self._refresh("gallery")

    def colour(self, by: str) -> None:
        """Colour the points by one of `colours`. Raises InputError for another one, as for the truth if unknown."""
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
        self._refresh("status", "curves", "scatter", "gallery")

    def compute(self) -> None:
        """Compute what is missing of the current choice, nothing else, and show it. Raises InputError if it fails."""
        choice = self.choice
        try:
            for done, whole, event in self.stored.compute(choice):
                self.note = f"{done} of {whole} done; {event.state} {event.cell.name}"
                self._refresh("status", progress=done / whole)
        finally:
            self.note = ""
        self.choose(**(choice if choice == self.choice else {}))

    def caption(self, row: int) -> str:
        """Return what is known of a row in words."""
        given, other = self.names[self.images.labels_given[row]], self.names[self.suspects.suggested[row]]
        true = "" if self.truth is None else f", true {self.names[self.truth[row]]}"
        flag = "flagged" if self.suspects.flagged[row] else "not flagged"
        return f"row {row}: given {given}, suggested {other}{true}, score {self.suspects.score[row]:.3g}, {flag}"

    def _short(self, row: int) -> str:
        given, other = self.images.labels_given[row], self.suspects.suggested[row]
        flag = "⚑ " if self.suspects.flagged[row] else ""
        return flag + self.names[given] + (f" → {self.names[other]}" if other != given else "")

    def gallery(self) -> str:
        """Return the thumbnails of the current page as HTML; each has its row in `data-row`."""
        shown = pages.cards(self.images, self.rows[self.page * PAGE :][:PAGE], SMALL, self.caption, self._short)
        return pages.fill("cards", name="page", label="Images", cards=shown)

    def heading(self) -> str:
        """Return in words what the gallery shows."""
        if self.selected is None:
            return f"The {len(self.rows)} most suspicious to {self.detector}: given → suggested, ⚑ flagged"
        page = f", page {self.page + 1} of {self.page_count}" if self.page_count > 1 else ""
        return f"{len(self.rows):,} selected{page}: given → suggested, ⚑ flagged"

    def hover(self, row: int | None) -> None:
        """Show one image with what is known of it beside the points; with None, the last one stays."""
        if row is not None:
            shown = pages.cards(
                self.images, [row], LARGE, self.caption, lambda row: self.caption(row).replace(", ", "\n")
            )
            self.widgets.hover.value = pages.fill("cards", name="hover", label="Picture of the point", cards=shown)

    def status(self) -> str:
        """Return in words whether the current choice is stored, and how well labels are found where that is known."""
        summary = "{init}, {noise_kind} noise of {noise_rate:.0%}: ".format(**self.choice) if self.choice else ""
        if self.note:
            return summary + self.note
        if self.missing:
            seconds = self.stored.seconds(**self.choice)
            time = "" if np.isnan(seconds) else f", about {seconds:.0f} s"
            return f"{summary}not stored; {len(self.missing)} to execute{time}. Below: what was shown before"
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
        labels = {"given labels": self.images.labels_given}
        labels |= {} if self.truth is None else {"true labels": self.truth}
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        *axes, last = figure.subplots(1, len(labels) + 1)
        for ax, (title, classes) in zip(axes, labels.items(), strict=True):
            figures.embedding(ax, self.xy, classes, self.names, title)
        figures.embedding_flags(last, self.xy, self.suspects.flagged, f"flagged by {self.detector}")
        alt = f"{len(self.xy):,} images as points, by {', '.join(labels)} and flags; {self.status()}"
        drawn = live.page(figure, alt) + self.curves()
        return pages.still(self.status(), self.heading(), self.gallery(), drawn)

    @functools.cached_property
    def widgets(self) -> SimpleNamespace:
        """The widgets by name, made when they are first asked for; `box` holds all of them."""
        w = SimpleNamespace(scatter=_scatter(self.xy), bar=pages.widget("FloatProgress", "bar", max=1))
        for name in ("line", "graph", "legend", "hover", "heading", "gallery"):
            setattr(w, name, pages.widget("HTML", f"{name}-box"))
        for name, text, act in [
            ("before", "← page before", lambda: self.turn(self.page - 1)),
            ("after", "next page →", lambda: self.turn(self.page + 1)),
            ("compute", "Compute it", self._start),
        ]:
            setattr(w, name, pages.widget("Button", name, act=act, description=text))
        colours = [(text, name) for name, text in self.colours.items()]
        w.by = pages.widget("ToggleButtons", "by", act=self.colour, options=colours)
        w.detector = _slider("detector", self.found.detectors, self.detector, self.detect)
        w.sliders = {
            name: _slider(name, values, self.choice[name], lambda value, name=name: self.choose(**{name: value}))
            for name, values in (self.stored.choices if self.stored else {}).items()
        }
        w.hover.value, points = "Hover over a point", w.scatter.widget
        points.observe(lambda change: self.select(change["new"]), "selection")
        points.observe(lambda change: self.hover(change["new"]), "hovering")
        w.turn = pages.widget("HBox", "row", [w.before, w.after])
        side = pages.widget("VBox", "side", [w.legend, w.hover])
        w.box = pages.widget("VBox", "explorer", [
            pages.widget("HTML", "style", f"<style>{pages.CSS}</style>"), *w.sliders.values(), w.detector,
            pages.widget("HBox", "row", [w.compute, w.bar]), w.line, w.graph,
            pages.widget("HTML", "help", pages.fill("explorer_help")), w.by,
            pages.widget("HBox", "plot", [points.add_class("ptglab-scatter"), side]), w.heading, w.turn, w.gallery,
        ]).add_class("ptglab-still")  # fmt: skip
        vars(self)["widgets"] = w  # what follows fills them
        self._refresh("status", "curves", "scatter", "gallery")
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
            options, detector = _options("detector", self.found.detectors), self.detector
            if w.detector.options != options:  # a slider with other options goes to the first of them
                w.detector.options, w.detector.value = options, detector
        if "curves" in parts:
            w.graph.value = self.curves() or w.graph.value
        if "gallery" in parts:
            w.heading.value, w.gallery.value = f"<b>{escape(self.heading())}</b>", self.gallery()
            w.before.disabled, w.after.disabled = self.page == 0, self.page + 1 >= self.page_count
            w.turn.layout.display = "" if self.page_count > 1 else "none"
            rows = [] if self.selected is None else self.selected
            if not np.array_equal(np.sort(w.scatter.widget.selection), rows):  # not what the browser itself has said
                w.scatter.selection(rows)
        if "scatter" in parts:
            self._paint(w.scatter, w.legend)

    def _paint(self, scatter, legend) -> None:
        """Colour the points, and say what the colours stand for; where flags are shown, flagged points are larger."""
        scatter.size(default=7)
        if self.by == "score":
            low, high = self.suspects.score.min(), self.suspects.score.max()
            legend.value = pages.fill("scale", low=f"{low:.3g}", high=f"{high:.3g}")
            scatter.color(by=self.suspects.score, map="cividis", norm=(low, high))
            return
        flagged = self.suspects.flagged.astype(np.int64)
        numbers = {"given": self.images.labels_given, "true": self.truth, "flag": flagged}[self.by]
        names, tints = self.names, [to_hex(colour) for colour in figures.class_colours(len(self.names))]
        if self.by == "flag":
            names, tints = ["not flagged", "flagged"], ["#999999", figures.WRONG]
        named = [(figures.short(name), tint) for name, tint in zip(names, tints, strict=True)]
        legend.value = pages.fill("legend", colours=named[:MOST_NAMED])
        present = np.unique(numbers)  # a colour, or a size, for each of these
        points = pd.Categorical(numbers, present)
        scatter.color(by=points, map=[tints[number] for number in present])
        if self.by == "flag":
            scatter.size(by=points, map=[(5, 9)[number] for number in present])

    def _start(self) -> None:
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

    _repr_mimebundle_ = pages.bundle


def _options(name: str, values) -> tuple[tuple, ...]:
    """Return (text, value) of the values of a slider."""
    return tuple((f"{v:.0%}" if name == "noise_rate" else str(v).replace("_", " "), v) for v in values)


def _slider(name: str, values, value, act):
    label, style = name.replace("_", " "), {"description_width": "6em"}
    return pages.widget("SelectionSlider", name.replace("_", "-"), act=act, options=_options(name, values), value=value,
                        description=label, style=style, layout={"width": "34em"})  # fmt: skip


def _scatter(xy: np.ndarray):
    """Return the scatter of all points, float [N, 2], in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pandas, at its import
        from jscatter import Scatter
    scatter = Scatter(data=pd.DataFrame(xy, columns=["x", "y"]), x="x", y="y", width=760, height=560)
    scatter.axes(False).tooltip(enable=False).mouse("lasso").camera(distance=MARGIN)
    return scatter if scatter.widget is None else scatter.opacity(default=0.85, unselected=0.12)
