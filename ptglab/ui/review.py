"""Looking at suspects and mending their labels in JupyterLab, by mouse or by keyboard; a still page elsewhere.

Whatever comes from data (ids, names of classes) is escaped where it becomes HTML. ipywidgets and anywidget are imported
where they are used. Every part that can be seen has a class that begins with `ptglab-`.
"""

import base64
import functools
from collections import Counter
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ptglab.audit import exports, reopen
from ptglab.audit.corrections import Corrections, Queue
from ptglab.audit.reopen import Findings
from ptglab.detect import neighbours
from ptglab.errors import InputError
from ptglab.lab import live, runs

FOLDER = Path(__file__).parent / "static"
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
DECIDING = {"keep", "suggest", "choose", "drop", "skip"}
HINT = (
    "Keys, once this box is clicked: <kbd>k</kbd> keep, <kbd>s</kbd> or <kbd>Enter</kbd> suggestion, <kbd>d</kbd> "
    "drop, <kbd>Space</kbd> skip, <kbd>u</kbd> undo, <kbd>n</kbd> neighbours, <kbd>{first}</kbd> … for a class, "
    "<kbd>c</kbd> the list of classes and there <kbd>Enter</kbd>, arrows to move."
)


def style() -> str:
    """Return the style sheet that the review and the explorer share, as a <style> element."""
    return f"<style>{(FOLDER / 'review.css').read_text(encoding='utf-8')}</style>"


def address(picture: bytes) -> str:
    """Return the data address of an encoded PNG or JPEG; the style sheet enlarges a PNG without blur."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def image(source: str, alt: str) -> str:
    """Return an <img> of the data address `source`; `alt` may be any text."""
    return f'<img src="{source}" alt="{escape(alt)}">'


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
        self._filling, self._shown = False, None
        self.filter()

    @property
    def suspects(self):
        return self.found.suspects(self.detector)

    def filter(self, **how) -> None:
        """Choose the suspects: `detector`, `pair` (given, suggested) or (), `range` of scores or None, `state`,
        `only_flagged`; what is not named stays."""
        for name, value in how.items():
            setattr(self, name, value)
        found = self.suspects
        chosen = found.flagged.copy() if self.only_flagged else np.ones(len(found.score), bool)
        if self.range is not None:
            chosen &= (found.score >= self.range[0]) & (found.score <= self.range[1])
        if self.pair:
            chosen &= (self.images.labels_given == self.pair[0]) & (found.suggested == self.pair[1])
        self.queue.order(found.score, chosen, self.state)

    def pairs(self) -> list[tuple[tuple[int, int], int]]:
        """Return ((given, suggested), count) of the suspects, the most frequent first."""
        rows = np.flatnonzero(self.suspects.flagged | (not self.only_flagged))
        both = zip(self.images.labels_given[rows].tolist(), self.suspects.suggested[rows].tolist(), strict=True)
        return Counter(both).most_common(MOST_PAIRS)

    def page(self) -> np.ndarray:
        """Return the rows of the current page, int64 [at most `size`]."""
        start = self.queue.place // self.size * self.size
        return self.queue.rows[start : start + self.size]

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

    def cards(self) -> list[dict]:
        """Return what is shown of each row of the current page: picture (a data address), alt, text."""
        rows, shown = self.page(), []
        for row, picture in zip(rows, exports.thumbnails(self.images, rows, SMALL), strict=True):
            given, suggested = (self.names[k[row]] for k in (self.images.labels_given, self.suspects.suggested))
            alt = f"{self.images.ids[row]}, labelled {given}, suggested {suggested}"
            shown.append({"picture": address(picture), "alt": alt, "text": f"{given} → {suggested}"})
        return shown

    def _pictures(self, rows, side: int) -> list[str]:
        """Return an <img> of each row, with its id and its label as the text for those who cannot see it."""
        labels, pictures = self.images.labels_given, exports.thumbnails(self.images, rows, side)
        texts = [f"{self.images.ids[row]}, labelled {self.names[labels[row]]}" for row in rows]
        return [image(address(picture), text) for picture, text in zip(pictures, texts, strict=True)]

    def facts(self) -> str:
        """Return what is known of the current image, as HTML."""
        row = self.queue.row
        if row is None:
            return "<p>No suspect fits: choose other labels, scores or states.</p>"
        given, suggested = self.images.labels_given[row], int(self.suspects.suggested[row])
        probable = ["", ""]
        if self.found.probs is not None:
            probable = [f" ({self.found.probs[row, k]:.1%} probable)" for k in (given, suggested)]
        lines = [
            ("ptglab-is-given", "given label", self.names[given] + probable[0]),
            ("ptglab-is-suggested", "suggested label", self.names[suggested] + probable[1]),
            ("", "decided", self.mark(row) or "nothing yet"),
            ("ptglab-small", f"score of {self.detector}", f"{self.suspects.score[row]:.3g}"),
            ("ptglab-small", "id", self.images.ids[row]),
        ]
        rows = (f'<div class="{c}"><dt>{escape(t)}</dt><dd><bdi>{escape(v)}</bdi></dd></div>' for c, t, v in lines)
        return f'<dl class="ptglab-facts">{"".join(rows)}</dl>'

    def large(self) -> str:
        """Return the current picture, as HTML."""
        return "" if self.queue.row is None else self._pictures([self.queue.row], LARGE)[0]

    def similar(self, number: int = 8) -> str:
        """Return the images most similar to the current one, with their labels, as HTML; see neighbours.nearest."""
        row = self.queue.row
        if row is None:
            return ""
        features = self.found.features
        similarity, index = neighbours.nearest(features[row : row + 1], number + 1, features)
        others = {i: s for i, s in zip(index[0].tolist(), similarity[0], strict=True) if i != row}
        rows = list(others)[:number]
        cells = []
        for i, picture in zip(rows, self._pictures(rows, SMALL), strict=True):
            words = f"{escape(self.names[self.images.labels_given[i]])}<br>similarity {others[i]:.2f}"
            cells.append(f"<figure>{picture}<figcaption>{words}</figcaption></figure>")
        return f'<div class="ptglab-similar" role="group" aria-label="Neighbours">{"".join(cells)}</div>'

    def apply(self) -> str:
        """Write the mended labels beside the decisions; return in words what was written."""
        labels, kept = self.found.apply(self.corrections, self.run)
        changed = int((labels != self.images.labels_given)[kept].sum())
        path = self.run.path / "mended.csv"
        return f"{kept.sum():,} labels are in {path}: {changed:,} changed, {(~kept).sum():,} dropped"

    @functools.cached_property
    def _learned(self) -> dict:
        """What was learned from the given labels, see Findings.learn."""
        return self.found.learn(self.images.labels_given)

    def train(self):
        """Learn from the given and from the mended labels; return `reopen.compared`."""
        labels, kept = self.found.apply(self.corrections, self.run)
        return reopen.compared(self._learned, self.found.learn(labels, kept))

    def still(self) -> str:
        """Return the current page as HTML without widgets."""
        cells = []
        for row, card in zip(self.page(), self.cards(), strict=True):
            words = f'<span>{escape(card["text"])}</span><span class="ptglab-mark">{escape(self.mark(row))}</span>'
            cells.append(f'<div class="ptglab-card">{image(card["picture"], card["alt"])}{words}</div>')
        head = f'<p class="ptglab-progress">{self.queue.progress()}</p><p>Given → suggested, most suspicious first.</p>'
        return f'{style()}<div class="ptglab-still">{head}<div class="ptglab-page">{"".join(cells)}</div></div>'

    @functools.cached_property
    def widgets(self) -> SimpleNamespace:
        """The widgets by name, made when they are first asked for: `box` holds all of them, `page` shows the
        thumbnails and listens to keys, `buttons` has one `ptglab-NAME` for each of ACTIONS."""
        import ipywidgets

        w, keys = SimpleNamespace(), {key: name for name, (_, keys, _) in ACTIONS.items() for key in keys}
        self.keys = keys | dict.fromkeys(self.numbers, "number") | {"c": "list"}
        w.page = _page_widget()(wanted=[*self.keys])
        w.page.on_msg(lambda _, content, buffers: self.receive(content))
        w.buttons, w.filters = {name: self._button(name) for name in ACTIONS}, self._filters()
        for name in ("picture", "facts", "progress", "status", "similar", "pages", "result"):
            setattr(w, name, ipywidgets.HTML().add_class(f"ptglab-{name}-box"))
        keys = {number: f"{key}: " for key, number in self.numbers.items()}
        names = [(f"{keys.get(number, '')}{name}", number) for number, name in enumerate(self.names)]
        w.list = ipywidgets.Dropdown(options=names, layout={"width": "14em"}).add_class("ptglab-class")

        def row(*children, name: str = "row"):
            children = [w.buttons[child] if isinstance(child, str) else child for child in children]
            return ipywidgets.HBox(children).add_class(f"ptglab-{name}")

        side = [
            w.progress, w.facts, row("keep", "suggest", "drop", "skip", "undo"), row(w.list, "choose"),
            row("neighbours", "previous", "next"), w.status, w.similar,
        ]  # fmt: skip
        large = row(w.picture, ipywidgets.VBox(side).add_class("ptglab-side"), name="large")
        hint = ipywidgets.HTML(HINT.format(first=escape(next(iter(self.numbers)))))
        turn = row("previous-page", w.pages, "next-page")
        parts = [row(*w.filters.values()), large, hint, turn, w.page, row("apply", "train"), w.result]
        w.box = ipywidgets.VBox(parts).add_class("ptglab-review")
        vars(self)["widgets"] = w  # what follows fills them
        self._fill()
        self.show()
        return w

    def _button(self, name: str):
        import ipywidgets

        label, keys, tooltip = ACTIONS[name]
        label += f" ({keys[0]})" if keys and not keys[0].startswith("arrow") else ""
        button = ipywidgets.Button(description=label, tooltip=tooltip).add_class(f"ptglab-{name}")
        button.on_click(lambda _: self.act(name))
        return button

    def _filters(self) -> dict:
        import ipywidgets

        filters = {
            "detector": ipywidgets.Dropdown(options=self.found.detectors, description="detector"),
            "pair": ipywidgets.Dropdown(description="labels"),
            "range": ipywidgets.FloatRangeSlider(description="score", continuous_update=False, readout_format=".3g"),
            "state": ipywidgets.Dropdown(options=Queue.STATES, value=self.state, description="show"),
            "only_flagged": ipywidgets.Checkbox(value=self.only_flagged, description="flagged only", indent=False),
        }
        for name, widget in filters.items():
            widget.style = {"description_width": "initial"}
            widget.layout = {"width": "24em" if name == "range" else "max-content"}
            widget.observe(functools.partial(self._filtered, name), "value")
        return filters

    def _fill(self) -> None:
        """Put into the filters what depends on the others: pairs of labels, and the range of scores."""
        self._filling, names, filters = True, self.names, self.widgets.filters
        pairs = {pair: f"{names[pair[0]]} → {names[pair[1]]} ({number:,})" for pair, number in self.pairs()}
        filters["pair"].options = [("all", ()), *((text, pair) for pair, text in pairs.items())]
        filters["pair"].value = self.pair if self.pair in pairs else ()
        low, high, slider = *map(float, (self.suspects.score.min(), self.suspects.score.max())), filters["range"]
        with slider.hold_trait_notifications():
            slider.min, slider.max, slider.step = low, high, (high - low) / 1000 or 1.0
            slider.value = self.range or (low, high)
        self._filling = False

    def _filtered(self, name: str, change: dict) -> None:
        if self._filling:
            return
        value, filters = change["new"], self.widgets.filters
        if name == "range":  # the slider rounds its ends to steps: at an end, everything beyond is meant too
            low, high = value
            value = (low if low > filters[name].min else -np.inf, high if high < filters[name].max else np.inf)
        try:
            self.filter(**{name: value}, **({"range": None, "pair": ()} if name == "detector" else {}))
            if name in ("detector", "only_flagged"):
                self._fill()
                self.filter(pair=filters["pair"].value)
            self.show()
        except (InputError, OSError) as error:
            self._say(str(error), wrong=True)

    def receive(self, content: dict) -> None:
        """Do what the browser sends: a key or a card; decisions and cards only if the picture is still the same."""
        key, same = content.get("key"), content.get("row") == self.widgets.page.row
        name = self.keys.get(key, key)
        if "go" in content and same:
            self.act("go", self.queue.place // self.size * self.size + int(content["go"]))
        elif name == "number" and same:
            self.act("class", self.numbers[key])
        elif name in ACTIONS and (same or name not in DECIDING):
            self.act(name)

    def act(self, name: str, value: int | None = None) -> None:
        """Do one of ACTIONS, or "go" to a place, or decide for the "class" of that number; errors are shown."""
        w, queue = self.widgets, self.queue
        try:
            if name in ("class", "choose"):
                self._say(self.decide("class", w.list.value if name == "choose" else value))
            elif name in DECIDING:
                self._say(self.decide({"suggest": "suggestion"}.get(name, name)))
            elif name == "undo":
                taken = queue.undo()
                self._say("nothing to undo" if taken is None else f"{taken.id}: {taken.decision} was taken back")
            elif name == "neighbours":
                w.similar.value = "" if w.similar.value else self.similar()
                return
            elif name == "apply":
                self._say(self.apply())
            elif name == "train":
                self._say("learning from both …")
                w.result.value = self.train().to_html(border=0, index_names=False)
                self._say("learned from the given and from the mended labels: see below")
            else:
                step = {"previous": -1, "next": 1, "previous-page": -self.size, "next-page": self.size}.get(name, 0)
                queue.place = max(0, min(queue.place + step if value is None else value, len(queue.rows) - 1))
            self.show()
        except (InputError, OSError) as error:
            self._say(str(error), wrong=True)

    def _say(self, text: str, wrong: bool = False) -> None:
        self.widgets.status.value = f'<span role="{"alert" if wrong else "status"}">{escape(text)}</span>'

    def show(self) -> None:
        """Show the current image; the page's pictures are made only when another page is turned to."""
        w, queue, rows, pages = self.widgets, self.queue, self.page(), -(-len(self.queue.rows) // self.size)
        w.picture.value, w.facts.value, w.similar.value = self.large(), self.facts(), ""
        w.progress.value = f'<span aria-live="polite">{queue.progress()}</span>'
        w.pages.value = f"page {queue.place // self.size + 1 if pages else 0:,} of {pages:,}"
        if queue.row is not None:
            w.list.value = int(self.images.labels_given[queue.row])
        with w.page.hold_sync():
            if self._shown != (shown := (self.detector, rows.tobytes())):
                w.page.cards, self._shown = self.cards(), shown
            w.page.marks, w.page.place = [self.mark(row) for row in rows], queue.place % self.size
            w.page.row = -1 if queue.row is None else queue.row

    def __repr__(self) -> str:
        return f"Review of {self.found.folder}: {self.queue.progress()}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        still = {"text/plain": repr(self), "text/html": self.still()}  # also for a reader without a kernel
        return (self.widgets.box._repr_mimebundle_(**kwargs) if live.interactive() else {}) | still


@functools.cache
def _page_widget() -> type:
    """Return the class of the widget that shows a page and listens to keys."""
    import anywidget
    import traitlets

    class Page(anywidget.AnyWidget):
        _esm, _css = FOLDER / "review.js", FOLDER / "review.css"
        cards = traitlets.List().tag(sync=True)  # picture, alt, text
        marks = traitlets.List().tag(sync=True)  # what was decided, a text a card
        place = traitlets.Int(0).tag(sync=True)  # of the current card
        row = traitlets.Int(-1).tag(sync=True)  # of the current image
        wanted = traitlets.List().tag(sync=True)  # keys that do something

    return Page
