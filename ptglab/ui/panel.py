"""The widgets of a review: buttons, keys, filters and a page of thumbnails over what `review.Review` does.

ipywidgets and anywidget are imported where they are used. Everything in sight has a class that begins with `ptglab-`.
"""

import functools
from html import escape
from pathlib import Path

from ptglab.audit.corrections import Queue
from ptglab.errors import InputError

FOLDER = Path(__file__).parent / "static"
ACTIONS = {  # what the buttons and the keys do: (label of the button, keys, what it is)
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
}  # fmt: skip
DECIDING = {"keep", "suggest", "choose", "drop", "skip"}
ROWS = [["keep", "suggest", "drop", "skip", "undo"], ["neighbours", "previous", "next"]]  # of buttons


def style() -> str:
    """Return the style sheet of the widgets, for a <style> element."""
    return (FOLDER / "review.css").read_text(encoding="utf-8")


@functools.cache
def _page_widget() -> type:
    """Return the class of the widget that shows a page and listens to keys."""
    import anywidget
    import traitlets

    class Page(anywidget.AnyWidget):
        _esm, _css = (FOLDER / "review.js").read_text(encoding="utf-8"), style()
        cards = traitlets.List().tag(sync=True)  # picture, crisp, alt, text
        marks = traitlets.List().tag(sync=True)  # what was decided, a text a card
        place = traitlets.Int(0).tag(sync=True)  # of the card in hand
        row = traitlets.Int(-1).tag(sync=True)  # in hand
        wanted = traitlets.List().tag(sync=True)  # keys that do something

    return Page


class Panel:
    """The widgets of a review; `box` is what is shown. Each of ACTIONS has a button `ptglab-NAME`."""

    def __init__(self, review):
        import ipywidgets

        self.review, self._filling, self._shown = review, False, None
        keys = {key: name for name, (_, keys, _) in ACTIONS.items() for key in keys}
        self.keys = keys | dict.fromkeys(review.numbers, "number") | {"c": "list"}
        self.page = _page_widget()(wanted=list(self.keys))
        self.page.on_msg(self._message)
        self.buttons = {name: self._button(name) for name in ACTIONS}
        html = {name: ipywidgets.HTML().add_class(f"ptglab-{name}")
                for name in ("picture", "facts-box", "progress", "status", "near-box", "pages", "result")}  # fmt: skip
        self.html = html
        numbers = {number: f"{key}: " for key, number in review.numbers.items()}
        options = [(f"{numbers.get(i, '')}{name}", i) for i, name in enumerate(review.names)]
        self.list = ipywidgets.Dropdown(options=options, layout={"width": "14em"}).add_class("ptglab-class")
        row = lambda *children: ipywidgets.HBox(children).add_class("ptglab-row")  # noqa: E731
        actions = [row(*(self.buttons[name] for name in names)) for names in ROWS]
        side = [html["progress"], html["facts-box"], actions[0], row(self.list, self.buttons["choose"]), actions[1],
                html["status"], html["near-box"]]  # fmt: skip
        large = ipywidgets.HBox([html["picture"], ipywidgets.VBox(side).add_class("ptglab-side")])
        turn = row(self.buttons["previous-page"], html["pages"], self.buttons["next-page"])
        last = row(self.buttons["apply"], self.buttons["train"])
        parts = [row(*self._filters()), large.add_class("ptglab-large"), self._hint(), turn, self.page, last]
        self.box = ipywidgets.VBox([*parts, html["result"]]).add_class("ptglab-review")
        self.show()

    def _button(self, name: str):
        import ipywidgets

        label, keys, tooltip = ACTIONS[name]
        label += f" ({keys[0]})" if keys and not keys[0].startswith("arrow") else ""
        button = ipywidgets.Button(description=label, tooltip=tooltip).add_class(f"ptglab-{name}")
        button.on_click(lambda _: self.act(name))
        return button

    def _hint(self):
        import ipywidgets

        numbers = f", <kbd>{escape(next(iter(self.review.numbers)))}</kbd> … for a class"
        return ipywidgets.HTML(
            "Keys, once this box is clicked: <kbd>k</kbd> keep, <kbd>s</kbd> or <kbd>Enter</kbd> suggestion, "
            f"<kbd>d</kbd> drop, <kbd>Space</kbd> skip, <kbd>u</kbd> undo, <kbd>n</kbd> neighbours{numbers}, "
            "<kbd>c</kbd> the list of classes and there <kbd>Enter</kbd>, arrows to move."
        ).add_class("ptglab-hint")

    def _filters(self) -> list:
        import ipywidgets

        review = self.review
        self.filters = {
            "detector": ipywidgets.Dropdown(options=review.found.detectors, description="detector"),
            "pair": ipywidgets.Dropdown(description="labels"),
            "range": ipywidgets.FloatRangeSlider(description="score", continuous_update=False, readout_format=".3g"),
            "state": ipywidgets.Dropdown(options=Queue.STATES, value=review.state, description="show"),
            "only_flagged": ipywidgets.Checkbox(value=review.only_flagged, description="flagged only", indent=False),
        }
        for name, widget in self.filters.items():
            widget.add_class(f"ptglab-filter-{name.replace('_', '-')}")
            widget.style = {"description_width": "initial"}
            widget.layout = {"width": "24em" if name == "range" else "max-content"}
            widget.observe(functools.partial(self._filtered, name), "value")
        self._fill()
        return list(self.filters.values())

    def _fill(self) -> None:
        """Put into the filters what depends on the others: pairs of labels, and the span of scores."""
        self._filling = True
        names, score = self.review.names, self.review.suspects.score
        pairs = [(f"{names[a]} → {names[b]} ({n:,})", (a, b)) for (a, b), n in self.review.pairs()]
        self.filters["pair"].options = [("all", ()), *pairs]
        self.filters["pair"].value = self.review.pair if self.review.pair in [p for _, p in pairs] else ()
        low, high = float(score.min()), float(score.max())
        slider = self.filters["range"]
        with slider.hold_trait_notifications():
            slider.min, slider.max, slider.step = low, high, (high - low) / 1000 or 1.0
            slider.value = self.review.range or (low, high)
        self._filling = False

    def _filtered(self, name: str, change: dict) -> None:
        if self._filling:
            return
        try:
            value = change["new"]
            if name == "range":
                slider = self.filters["range"]  # whose ends are rounded to steps: at an end all are meant
                low, high = value
                value = (low if low > slider.min else -float("inf"), high if high < slider.max else float("inf"))
            more = {"range": None, "pair": ()} if name == "detector" else {}
            self.review.filter(**{name: value}, **more)
            if name in ("detector", "only_flagged"):
                self._fill()
                self.review.filter(pair=self.filters["pair"].value)
            self.show()
        except (InputError, OSError) as error:
            self._say(str(error), wrong=True)

    def _message(self, _, content: dict, buffers) -> None:
        """Do what the browser sends: a key or a card; decisions and cards only if the picture is still the same."""
        key, same = content.get("key"), content.get("row") == self.page.row
        name = self.keys.get(key, key)
        if "go" in content and same:
            start = self.review.queue.place // self.review.size * self.review.size
            self.act("go", start + int(content["go"]))
        elif name == "number" and same:
            self.act("class", self.review.numbers[key])
        elif name in ACTIONS and (same or name not in DECIDING):
            self.act(name)

    def act(self, name: str, value: int | None = None) -> None:
        """Do one of ACTIONS, or "go" to a place, or decide for the "class" of that number; errors are shown."""
        review, queue = self.review, self.review.queue
        try:
            if name in ("class", "choose"):
                self._say(review.decide("class", self.list.value if name == "choose" else value))
            elif name in DECIDING:
                self._say(review.decide({"suggest": "suggestion"}.get(name, name)))
            elif name == "undo":
                taken = queue.undo()
                self._say("nothing to undo" if taken is None else f"{taken.id}: {taken.decision} was taken back")
            elif name == "neighbours":
                self.html["near-box"].value = "" if self.html["near-box"].value else review.near()
                return
            elif name == "apply":
                self._say(review.apply())
            elif name == "train":
                self._say("learning from both …")
                self.html["result"].value = review.train().to_html(border=0, index_names=False)
                self._say("learned from the given and from the mended labels: see below")
            else:
                step = {"previous": -1, "next": 1, "previous-page": -review.size, "next-page": review.size}.get(name, 0)
                place = queue.place + step if value is None else value
                queue.place = max(0, min(place, len(queue.rows) - 1))
            self.show()
        except (InputError, OSError) as error:
            self._say(str(error), wrong=True)

    def _say(self, text: str, wrong: bool = False) -> None:
        self.html["status"].value = f'<span role="{"alert" if wrong else "status"}">{escape(text)}</span>'

    def show(self) -> None:
        """Show the one in hand; the page's pictures are made only when another page is turned to."""
        review, queue = self.review, self.review.queue
        rows = review.page()
        self.html["picture"].value, self.html["facts-box"].value = review.large(), review.facts()
        self.html["progress"].value = f'<span aria-live="polite">{queue.progress()}</span>'
        self.html["near-box"].value = ""
        pages = -(-len(queue.rows) // review.size)
        self.html["pages"].value = f"page {queue.place // review.size + 1 if pages else 0:,} of {pages:,}"
        if queue.row is not None:
            self.list.value = int(review.images.labels_given[queue.row])
        with self.page.hold_sync():
            turned = (review.detector, rows.tobytes())
            if turned != self._shown:
                self.page.cards = review.cards()
                self._shown = turned
            self.page.marks = [review.mark(row) for row in rows]
            self.page.place = queue.place % review.size
            self.page.row = -1 if queue.row is None else queue.row
