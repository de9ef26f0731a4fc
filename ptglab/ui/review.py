"""Looking at suspects and mending their labels in JupyterLab, by mouse or by keyboard; a still page elsewhere."""

import functools
from collections import Counter
from html import escape
from types import SimpleNamespace

import numpy as np
import pandas as pd

from ptglab.audit import reopen
from ptglab.audit.corrections import Corrections, Queue
from ptglab.audit.reopen import Findings
from ptglab.detect import neighbours
from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.ui import pages

MOST_PAIRS = 500  # pairs of classes that the filter offers, the most frequent ones
SMALL, LARGE = 96, 384  # pixels a side of the pictures of a page, and of the current one
DONE = {"keep": "kept", "drop": "dropped", "skip": "skipped"}
ACTIONS = {  # what the buttons and the keys do: (label of the button, keys, explanation)
    "keep": ("Keep", ["k"], "The given label is right"),
    "suggest": ("Take the suggestion", ["s", "enter"], "The suggested label is right"),
    "choose": ("Set this class", [], "The class in the list beside is right"),
    "drop": ("Drop", ["d"], "The image belongs to no class: leave it out"),
    "skip": ("Skip", ["space"], "Decide later"),
    "undo": ("Undo", ["u"], "Take the last decision back"),
    "neighbours": ("Neighbours", ["n"], "Show the most similar images and their labels"),
    "previous": ("← previous", ["arrowleft"], "Go to the picture before, without a decision"),
    "next": ("next →", ["arrowright"], "Go to the next picture, without a decision"),
    "previous-page": ("↑ page before", ["arrowup"], "Show the page before"),
    "next-page": ("↓ next page", ["arrowdown"], "Show the next page"),
    "apply": ("Apply", [], "Write the mended labels to mended.csv"),
    "train": ("Train again", [], "Learn from the mended labels, and compare with the given ones"),
}
DECISIONS = {"keep": "keep", "suggest": "suggestion", "choose": "class", "drop": "drop", "skip": "skip"}


class Review:
    """The suspects of `found`, most suspicious first, `size` a page, and the decisions on them.

    Show it as the last value of a cell: widgets in JupyterLab, and otherwise (papermill, nbval) a still picture of the
    current page. Decisions go to corrections.csv in the folder of `run`, where "Apply" writes mended.csv; a new kernel
    goes on from there. Raises InputError if the file holds decisions on another set.
    """

    def __init__(self, found: Findings, run: runs.Run, size: int = 24):
        self.found, self.run, self.size = found, run, size
        self.images, self.names = found.images, found.images.class_names
        self.corrections = Corrections(run.path / "corrections.csv")
        self.queue = Queue(self.corrections, self.images.ids, self.images.labels_given, self.names)
        self.detector, self.pair, self.range, self.state = found.detector, (), None, "all"
        self.only_flagged = bool(self.suspects.flagged.any())
        digits = all(len(name) == 1 and name.isdecimal() for name in self.names)
        keys = self.names if digits else [*"1234567890"]
        self.numbers = {key: number for number, key in enumerate(keys[: len(self.names)])}
        self.keys = {key: ("choose", number) for key, number in self.numbers.items()}
        self.keys |= {key: (name, None) for name, (_, keys, _) in ACTIONS.items() for key in keys}
        self._filling, self._shown, self._learned = False, None, None
        self.filter()

    @property
    def suspects(self):
        return self.found.suspects(self.detector)

    @property
    def start(self) -> int:
        """The place of the first image of the current page."""
        return self.queue.place // self.size * self.size

    @property
    def rows(self) -> np.ndarray:
        """The rows of the current page, int64 [at most `size`]."""
        return self.queue.rows[self.start : self.start + self.size]

    def filter(self, **how) -> None:
        """Choose the suspects: `detector`, `pair` (given, suggested) or (), `range` of scores or None, `state`,
        `only_flagged`; what is not named stays."""
        for name, value in how.items():
            setattr(self, name, value)
        score, (low, high) = self.suspects.score, self.range or (-np.inf, np.inf)
        chosen = (score >= low) & (score <= high) & (self.suspects.flagged | (not self.only_flagged))
        if self.pair:
            chosen &= (self.images.labels_given == self.pair[0]) & (self.suspects.suggested == self.pair[1])
        self.queue.order(score, chosen, self.state)

    def decide(self, decision: str, label: int | None = None) -> str:
        """Write a decision on the current image and go on; return in words what was done."""
        if decision == "suggestion" and self.queue.row is not None:
            label = int(self.suspects.suggested[self.queue.row])
        taken = self.queue.decide(decision, label)
        return f"{taken.id}: {DONE.get(decision, f'labelled {taken.label}')}"

    def mark(self, row: int) -> str:
        """Return what was decided on a row, in a word; empty if nothing was."""
        decision = self.corrections.of(self.images.ids[row])
        return "" if decision is None else DONE.get(decision.decision, f"→ {decision.label}")

    def _labels(self, row: int) -> tuple[str, str]:
        return self.names[self.images.labels_given[row]], self.names[self.suspects.suggested[row]]

    def caption(self, row: int) -> str:
        """Return what a picture shows, for those who cannot see it."""
        return "{}, labelled {}, suggested {}".format(self.images.ids[row], *self._labels(row))

    def cards(self) -> list[dict]:
        """Return what is shown of each row of the current page, see pages.cards."""
        return pages.cards(self.images, self.rows, SMALL, self.caption, lambda row: " → ".join(self._labels(row)))

    def facts(self) -> str:
        """Return what is known of the current image, as HTML."""
        row, probs = self.queue.row, self.found.probs
        if row is None:
            return "<p>No suspect fits: choose other labels, scores or states.</p>"
        lines = [("decided", "decided", self.mark(row) or "nothing yet")]
        for name, label in [("suggested", self.suspects.suggested[row]), ("given", self.images.labels_given[row])]:
            probable = "" if probs is None else f" ({probs[row, label]:.1%} probable)"
            lines.insert(0, (f"is-{name}", f"{name} label", self.names[label] + probable))
        lines.append(("small", f"score of {self.detector}", f"{self.suspects.score[row]:.3g}"))
        return pages.fill("facts", lines=[*lines, ("small", "id", self.images.ids[row])])

    def similar(self, number: int = 8) -> str:
        """Return the images most similar to the current one, with their labels, as HTML; see neighbours.nearest."""
        row = self.queue.row
        if row is None:
            return ""
        features = self.found.features
        similarity, index = neighbours.nearest(features[row : row + 1], number + 1, features)
        others = {i: s for i, s in zip(index[0].tolist(), similarity[0], strict=True) if i != row}
        shown = pages.cards(self.images, [*others][:number], SMALL, self.caption,
                            lambda i: f"{self._labels(i)[0]}\nsimilarity {others[i]:.2f}")  # fmt: skip
        return pages.fill("cards", name="similar", label="Neighbours", cards=shown)

    def apply(self) -> str:
        """Write the mended labels beside the decisions; return in words what was written."""
        labels, kept = self.found.apply(self.corrections, self.run)
        changed = int((labels != self.images.labels_given)[kept].sum())
        path = self.run.path / "mended.csv"
        return f"{kept.sum():,} labels are in {path}: {changed:,} changed, {(~kept).sum():,} dropped"

    def train(self) -> pd.DataFrame:
        """Learn from the given and from the mended labels; return `reopen.compared`."""
        labels, kept = self.found.apply(self.corrections, self.run)
        self._learned = self._learned or self.found.learn(self.images.labels_given)
        return reopen.compared(self._learned, self.found.learn(labels, kept))

    def still(self) -> str:
        """Return the current page as HTML without widgets."""
        shown = [card | {"text": f"{card['text']}\n{self.mark(card['row'])}"} for card in self.cards()]
        gallery = pages.fill("cards", name="page", label="Suspects of this page", cards=shown)
        return pages.still(self.queue.progress(), "Given → suggested, most suspicious first.", gallery)

    @functools.cached_property
    def widgets(self) -> SimpleNamespace:
        """The widgets by name, made when they are first asked for: `box` holds all of them, `page` shows the
        thumbnails and listens to keys, `buttons` has one `ptglab-NAME` for each of ACTIONS."""
        w = SimpleNamespace(buttons={}, filters=self._filters(), page=_page([*self.keys, "c"]))
        w.page.on_msg(lambda _, content, buffers: self.receive(content))
        for name, (text, keys, tooltip) in ACTIONS.items():
            text += f" ({keys[0]})" if keys and not keys[0].startswith("arrow") else ""
            act = functools.partial(self.act, name)
            w.buttons[name] = pages.widget("Button", name, act=act, description=text, tooltip=tooltip)
        for name in ("picture", "facts", "progress", "status", "similar", "pages", "result"):
            setattr(w, name, pages.widget("HTML", f"{name}-box"))
        keys = {number: f"{key}: " for key, number in self.numbers.items()}
        names = [(f"{keys.get(number, '')}{name}", number) for number, name in enumerate(self.names)]
        w.list = pages.widget("Dropdown", "class", options=names, layout={"width": "14em"})

        def row(*parts, name: str = "row"):
            parts = [w.buttons[part] if isinstance(part, str) else part for part in parts]
            return pages.widget("HBox", name, parts)

        side = pages.widget("VBox", "side", [
            w.progress, w.facts, row("keep", "suggest", "drop", "skip", "undo"), row(w.list, "choose"),
            row("neighbours", "previous", "next"), w.status, w.similar,
        ])  # fmt: skip
        w.box = pages.widget("VBox", "review", [
            row(*w.filters.values()), row(w.picture, side, name="large"),
            pages.widget("HTML", "help", pages.fill("review_help", first=next(iter(self.numbers)))),
            row("previous-page", w.pages, "next-page"), w.page, row("apply", "train"), w.result,
        ])  # fmt: skip
        vars(self)["widgets"] = w  # what follows fills them
        self._fill()
        self.show()
        return w

    def _filters(self) -> dict:
        filters = {}
        for name, label, kind, traits in [
            ("detector", "detector", "Dropdown", {"options": self.found.detectors}),
            ("pair", "labels", "Dropdown", {}),
            ("range", "score", "FloatRangeSlider", {"continuous_update": False, "readout_format": ".3g"}),
            ("state", "show", "Dropdown", {"options": Queue.STATES}),
            ("only_flagged", "flagged only", "Checkbox", {"value": self.only_flagged, "indent": False}),
        ]:
            style, layout = {"description_width": "initial"}, {"width": "24em" if name == "range" else "max-content"}
            act = functools.partial(self._filtered, name)
            filters[name] = pages.widget(
                kind, f"by-{name}", act=act, description=label, style=style, layout=layout, **traits
            )
        return filters

    def _fill(self) -> None:
        """Put into the filters what depends on the others: pairs of labels, and the range of scores."""
        self._filling, names, filters = True, self.names, self.widgets.filters
        rows = np.flatnonzero(self.suspects.flagged | (not self.only_flagged))
        both = zip(self.images.labels_given[rows].tolist(), self.suspects.suggested[rows].tolist(), strict=True)
        pairs = dict(Counter(both).most_common(MOST_PAIRS))
        texts = [(f"{names[pair[0]]} → {names[pair[1]]} ({number:,})", pair) for pair, number in pairs.items()]
        filters["pair"].options = [("all", ()), *texts]
        filters["pair"].value = self.pair if self.pair in pairs else ()
        low, high, slider = *map(float, (self.suspects.score.min(), self.suspects.score.max())), filters["range"]
        with slider.hold_trait_notifications():
            slider.min, slider.max, slider.step = low, high, (high - low) / 1000 or 1.0
            slider.value = self.range or (low, high)
        self._filling = False

    def _filtered(self, name: str, value) -> None:
        if self._filling:
            return
        if name == "range":  # the slider rounds its ends to steps: at an end, everything beyond is meant too
            (low, high), slider = value, self.widgets.filters["range"]
            value = (low if low > slider.min else -np.inf, high if high < slider.max else np.inf)
        self.act("filter", {name: value} | ({"range": None, "pair": ()} if name == "detector" else {}))

    def receive(self, content: dict) -> None:
        """Do what the browser sends: a key or a card; decisions and cards only if the picture is still the same."""
        same, key = content.get("row") == self.widgets.page.state["row"], content.get("key")
        name, value = self.keys.get(key, (key, None))
        if "go" in content and same:
            self.act("go", self.start + int(content["go"]))
        elif name in ACTIONS and (same or name not in DECISIONS):
            self.act(name, value)

    def act(self, name: str, value=None) -> None:
        """Do one of ACTIONS, show any error; also "go" to the place `value`, or "filter" as the dict `value` says.

        To "choose" is to decide for the class number `value`, by default for that in the list.
        """
        w, queue = self.widgets, self.queue
        try:
            if name in DECISIONS:
                self._say(self.decide(DECISIONS[name], w.list.value if value is None else value))
            elif name == "undo":
                taken = queue.undo()
                self._say("nothing to undo" if taken is None else f"{taken.id}: {taken.decision} was taken back")
            elif name == "apply":
                self._say(self.apply())
            elif name == "train":
                self._say("learning from both …")
                w.result.value = self.train().to_html(border=0, index_names=False)
                self._say("learned from the given and from the mended labels: see below")
            elif name == "neighbours":
                w.similar.value = "" if w.similar.value else self.similar()
                return
            elif name == "filter":
                self.filter(**value)
                if value.keys() & {"detector", "only_flagged"}:
                    self._fill()
                    self.filter(pair=w.filters["pair"].value)
            else:
                step = {"previous": -1, "next": 1, "previous-page": -self.size, "next-page": self.size}.get(name, 0)
                queue.place = max(0, min(queue.place + step if value is None else value, len(queue.rows) - 1))
            self.show()
        except (InputError, OSError) as error:
            self._say(str(error), "alert")

    def _say(self, text: str, role: str = "status") -> None:
        self.widgets.status.value = f'<span role="{role}">{escape(text)}</span>'

    def show(self) -> None:
        """Show the current image; the page's pictures are made only when another page is turned to."""
        w, queue, rows, number = self.widgets, self.queue, self.rows, -(-len(self.queue.rows) // self.size)
        current = [] if queue.row is None else [queue.row]
        picture = pages.cards(self.images, current, LARGE, self.caption, lambda row: "")
        w.picture.value = pages.fill("cards", name="current", label="Current picture", cards=picture)
        w.facts.value, w.similar.value = self.facts(), ""
        w.progress.value = f'<span aria-live="polite">{queue.progress()}</span>'
        w.pages.value = f"page {self.start // self.size + 1 if number else 0:,} of {number:,}"
        if queue.row is not None:
            w.list.value = int(self.images.labels_given[queue.row])
        with w.page.hold_sync():
            if self._shown != (shown := (self.detector, rows.tobytes())):
                w.page.cards, self._shown = self.cards(), shown
            marks = [self.mark(row) for row in rows]
            w.page.state = {"marks": marks, "place": queue.place - self.start, "row": (current or [-1])[0]}

    def __repr__(self) -> str:
        return f"Review of {self.found.folder}: {self.queue.progress()}"

    _repr_mimebundle_ = pages.bundle


def _page(wanted: list[str]):
    """Return the widget that shows a page and listens to the keys `wanted`."""
    import anywidget
    import traitlets

    class Page(anywidget.AnyWidget):
        _esm, _css = pages.STATIC / "review.js", pages.CSS
        wanted = traitlets.List().tag(sync=True)
        cards = traitlets.List().tag(sync=True)  # see pages.cards
        state = traitlets.Dict({"row": -1}).tag(sync=True)  # marks, a text a card; place, row of the current image

    return Page(wanted=wanted)
