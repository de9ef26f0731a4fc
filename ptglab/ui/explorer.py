"""Looking at all images at once: an embedding to zoom and lasso, the images behind it, and what a sweep has stored.

Widgets in JupyterLab, a still picture elsewhere. Whatever comes from data is escaped where it becomes HTML.
"""

import functools
from html import escape

import numpy as np
from matplotlib.figure import Figure

from ptglab.audit import exports
from ptglab.audit.reopen import Findings
from ptglab.detect import neighbours
from ptglab.errors import InputError, one_of
from ptglab.lab import figures, live, metrics, runs, tables
from ptglab.ui import lasso, panel, review
from ptglab.ui.stored import Stored

PAGE, STILL, SIDE = 60, 20, 64  # thumbnails a page of the gallery, in a still picture; pixels a side
CURVES = {"accuracy_test": "test images", "learned_right": "right labels", "learned_wrong": "wrong labels"}


def plane(run: runs.Run, features: np.ndarray, seed: int) -> np.ndarray:
    """Return UMAP's coordinates float32 [N, 2] of `features` [N, D], kept in `run` as the array `plane`.

    Raises InputError if those that are kept are of another number of images.
    """
    if not (run.path / "arrays" / "plane.npy").exists():
        run.save_array("plane", neighbours.embedding(features, seed))
    kept = run.array("plane")
    if kept.shape != (len(features), 2):
        raise InputError(f"{run.path} holds a plane of {len(kept)} images, not {len(features)}: give another run_dir")
    return kept


class Explorer:
    """The images of `found` where `plane`, float [N, 2], puts them; show it as the last value of a cell.

    truth: the true labels, int64 [N], where they are known. stored: a sweep whose cells are of the same images, and
    choice: which of them `found` is, see Stored.cells; then there are sliders to choose others. Raises InputError if
    plane or truth are of other images.
    """

    def __init__(
        self, found: Findings, plane: np.ndarray, truth=None, stored: Stored | None = None, choice: dict | None = None
    ):
        if not len(found.images) == len(plane) == len(plane if truth is None else truth):
            raise InputError(f"a plane of {len(plane)} images for {len(found.images)}: they must be of the same run")
        self.plane, self.truth, self.stored, self.choice = np.asarray(plane), truth, stored, choice
        self.names, self.by, self.selected, self.page = found.images.class_names, "given", None, 0
        self.note, self._drawn, self._ids = "", {}, found.images.ids
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
        if self.selected is not None:
            return self.selected
        return np.argsort(self.suspects.score, kind="stable")[:STILL]

    def select(self, rows) -> None:
        """Fill the gallery with exactly these rows, in order of the data set; with None, the most suspicious."""
        self.selected, self.page = None if rows is None else np.unique(np.asarray(rows, np.int64)), 0
        self._draw("picked", "gallery")

    def colour(self, by: str) -> None:
        """Colour the points by one of lasso.COLOURS. Raises InputError for another one, and where no truth is known."""
        self.by = one_of("colour", by, self.colours)
        self._draw("scatter")

    @property
    def colours(self) -> list[str]:
        return [name for name in lasso.COLOURS if name != "true" or self.truth is not None]

    def detect(self, detector: str) -> None:
        """Let another one of `found.detectors` judge the labels."""
        self._show(self.found, one_of("detector", detector, self.found.detectors))
        self._draw("status", "scatter", "gallery")

    def choose(self, **choice) -> None:
        """Choose another `init`, `noise_kind` or `noise_rate`: shown at once if it is stored, and else `missing`."""
        self.choice = self.choice | choice
        if not self.missing:
            self._show(self.stored.read(**self.choice), self.detector)
        self._draw("status", "curves", *([] if self.missing else ["detectors", "scatter", "gallery"]))

    @property
    def missing(self) -> list:
        """The cells that the choice in hand needs and the sweep has not stored."""
        return self.stored.missing(**self.choice) if self.stored else []

    def compute(self) -> None:
        """Compute what is missing of the choice in hand, nothing else, and show it. Raises InputError if it fails."""
        choice = self.choice
        for done, whole, event in self.stored.compute(choice):
            self.note = f"{done} of {whole} done, {event.state} {event.cell.name}"
            self._draw("status", progress=done / whole)
        self.note = ""
        self.choose(**(choice if choice == self.choice else {}))

    def caption(self, row: int) -> str:
        """Return a row in words."""
        given, other = self.names[self.images.labels_given[row]], self.names[self.suspects.suggested[row]]
        true = "" if self.truth is None else f", true {self.names[self.truth[row]]}"
        flag = "flagged" if self.suspects.flagged[row] else "not flagged"
        return f"row {row}: given {given}, suggested {other}{true}, score {self.suspects.score[row]:.3g}, {flag}"

    def gallery(self, rows=None) -> str:
        """Return the thumbnails of `rows`, by default of the page in hand, as HTML; each has its row in `data-row`."""
        rows = self.rows[self.page * PAGE :][:PAGE] if rows is None else rows
        cards = []
        for row, picture in zip(rows, exports.thumbnails(self.images, rows, SIDE), strict=True):
            given, other = self.images.labels_given[row], self.suspects.suggested[row]
            words = self.names[given] + (f" → {self.names[other]}" if other != given else "")
            mark = "⚑ " if self.suspects.flagged[row] else ""
            image = review.image(picture, self.caption(row))
            cards.append(f'<div class="ptglab-card" data-row="{row}">{image}<span>{mark}{escape(words)}</span></div>')
        return f'<div class="ptglab-page" role="group" aria-label="Images">{"".join(cards)}</div>'

    def heading(self) -> str:
        """Return in words what the gallery shows."""
        if self.selected is None:
            return f"The {len(self.rows)} most suspicious to {self.detector}: given → suggested, ⚑ flagged"
        pages = f", page {self.page + 1} of {self.pages}" if self.pages > 1 else ""
        return f"{len(self.rows):,} selected{pages}: given → suggested, ⚑ flagged"

    @property
    def pages(self) -> int:
        return max(1, -(-len(self.rows) // PAGE))

    def large(self, row: int) -> str:
        """Return one image with what is known of it, as HTML."""
        picture = exports.thumbnails(self.images, [row], 256)[0]
        about = escape(self.caption(row)).replace(", ", "<br>").replace(": ", "<br>", 1)
        return f'<figure class="ptglab-hover">{review.image(picture, self.caption(row))}<figcaption>{about}</figure>'

    def status(self) -> str:
        """Return in words whether the choice in hand is stored, and how well labels are found where that is known."""
        told = "{init}, {noise_kind} noise of {noise_rate:.0%}: ".format(**self.choice) if self.choice else ""
        if self.note:
            return told + self.note
        if self.missing:
            seconds = self.stored.seconds(**self.choice)
            time = f", about {seconds:.0f} s" if seconds == seconds else ""
            return f"{told}not stored; {len(self.missing)} to execute{time}. Below: what was shown before"
        told += f"{self.suspects.flagged.sum():,} of {len(self.images):,} labels flagged by {self.detector}"
        if self.truth is not None:
            scores = metrics.detection(self.suspects, self.images.labels_given != self.truth)
            told += f", F1 {scores['f1']:.2f}"
        return told

    def curves(self) -> str:
        """Return the accuracy of the choice in hand, epoch by epoch and against the rate, as HTML; "" if not stored."""
        table = self.stored.curves(**self.choice) if self.stored else None
        if table is None:
            return ""
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        shown = {text: table[name] for name, text in CURVES.items() if table[name].notna().all()}
        figures.lines(left, {t: (table["epoch"], y) for t, y in shown.items()}, "epoch", "as labelled, %", percent=True)
        left.set_ylim(0, 102)
        rows = self.stored.results()
        lines, _ = tables.by_rate(rows, "accuracy_last", self.choice["noise_kind"])
        figures.points(right, lines, f"{self.choice['noise_kind']} noise, nominal %", "test accuracy, last epoch, %")
        right.axvline(100 * self.choice["noise_rate"], color=figures.MUTED, linewidth=1, linestyle=":")
        alt = ", ".join(f"{text} {100 * y.iloc[-1]:.0f} %" for text, y in shown.items())
        return live.page(figure, f"Curves of {'{init} at {noise_rate:.0%}'.format(**self.choice)}, last epoch: {alt}")

    def still(self) -> str:
        """Return everything as HTML without widgets: the plane by label and by flag, the curves, the suspects."""
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        given, middle, flags = figure.subplots(1, 3)
        xy, labels = self.plane, self.images.labels_given
        figures.embedding(given, xy, labels, self.names, "given labels")
        if self.truth is None:
            middle.set_axis_off()
        else:
            figures.embedding(middle, xy, self.truth, self.names, "true labels")
        figures.embedding_flags(flags, xy, self.suspects.flagged, f"flagged by {self.detector}")
        words = f"The plane of {len(labels):,} images: given labels, true labels, flags; {self.status()}"
        head, page = escape(self.heading()), self.gallery(self.rows[:STILL])
        drawn = f"<p>{escape(self.status())}</p>{live.page(figure, words)}{self.curves()}"
        return f'<style>{panel.style()}</style><div class="ptglab-still">{drawn}<p>{head}</p>{page}</div>'

    def _draw(self, *parts: str, **values) -> None:
        """Bring the widgets up to date, if they have been made."""
        for part in parts:
            if part in self._drawn:
                self._drawn[part](**values) if part == "status" else self._drawn[part]()

    @functools.cached_property
    def widgets(self):
        """The widgets, made when they are asked for first."""
        widgets = lasso.Widgets(self)
        self._drawn = widgets.parts
        return widgets

    def __repr__(self) -> str:
        return f"Explorer of {self.found.folder}: {self.status()}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        still = {"text/plain": repr(self), "text/html": self.still()}  # also for who opens it without a kernel
        return (self.widgets.box._repr_mimebundle_(**kwargs) if live.interactive() else {}) | still
