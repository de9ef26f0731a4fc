"""Looking at suspects and mending their labels in JupyterLab, by mouse or by keyboard; a still page elsewhere.

Whatever comes from data (ids, names of classes) is escaped where it becomes HTML.
"""

import base64
import functools
from collections import Counter
from html import escape

import numpy as np

from ptglab.audit import exports, reopen
from ptglab.audit.corrections import Corrections, Queue
from ptglab.audit.reopen import Findings
from ptglab.detect import neighbours
from ptglab.lab import live, runs
from ptglab.ui import panel

MOST_PAIRS = 500  # of classes that can be chosen, the most frequent ones
SMALL, LARGE = 96, 384  # pixels a side of the pictures of a page, and of the one in hand
DONE = {"keep": "kept", "drop": "dropped", "skip": "skipped"}


def image(picture: bytes, alt: str) -> str:
    """Return an <img> of an encoded PNG or JPEG, crisp if it is small; `alt` may be any text."""
    return _img(_address(picture), _crisp(picture), alt)


def _img(address: str, crisp: bool, alt: str) -> str:
    return f'<img class="{"ptglab-crisp" if crisp else ""}" src="{address}" alt="{escape(alt)}">'


def _crisp(picture: bytes) -> bool:
    return picture.startswith(b"\x89PNG")  # what exports.thumbnails leaves exact


def _address(picture: bytes) -> str:
    kind = "png" if _crisp(picture) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


class Review:
    """The suspects of `found`, most suspicious first, `size` a page, and the decisions on them.

    Show it as the last value of a cell: widgets where there is somebody to use them, and otherwise (papermill, nbval)
    a still picture of the page in hand. Decisions go to corrections.csv in the folder of `run`, where "Apply" writes
    mended.csv; a kernel that starts anew goes on from there. Raises InputError if the file is of another set.
    """

    def __init__(self, found: Findings, run: runs.Run, size: int = 24):
        self.found, self.run, self.size = found, run, size
        self.images, self.names = found.images, found.images.class_names
        self.corrections = Corrections(run.path / "corrections.csv")
        self.queue = Queue(self.corrections, self.images.ids, self.images.labels_given, self.names)
        self.detector, self.pair, self.range, self.state = found.detector, (), None, "all"
        self.only_flagged = bool(self.suspects.flagged.any())
        digits = all(len(name) == 1 and name.isdecimal() for name in self.names)
        places = self.names if digits else [*"1234567890"]
        self.numbers = {key: number for number, key in enumerate(places[: len(self.names)])}
        self._before: dict | None = None
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
        """Return ((given, suggested), how many) of what is suspected, the most frequent first."""
        rows = np.flatnonzero(self.suspects.flagged | (not self.only_flagged))
        both = zip(self.images.labels_given[rows].tolist(), self.suspects.suggested[rows].tolist(), strict=True)
        return Counter(both).most_common(MOST_PAIRS)

    def page(self) -> np.ndarray:
        """Return the rows of the page in hand, int64 [at most `size`]."""
        start = self.queue.place // self.size * self.size
        return self.queue.rows[start : start + self.size]

    def decide(self, decision: str, label: int | None = None) -> str:
        """Write a decision on the one in hand and go on; return in words what was done."""
        if decision == "suggestion" and self.queue.row is not None:
            label = int(self.suspects.suggested[self.queue.row])
        taken = self.queue.decide(decision, label)
        return f"{taken.id}: {DONE.get(decision, f'labelled {taken.label}')}"

    def mark(self, row: int) -> str:
        """Return what was decided on a row, in a word; empty if nothing was."""
        decision = self.corrections.of(self.images.ids[row])
        return "" if decision is None else DONE.get(decision.decision, f"→ {decision.label}")

    def cards(self) -> list[dict]:
        """Return what is shown of each row of the page in hand: picture (a data address), crisp, alt, text."""
        rows, shown = self.page(), []
        for row, picture in zip(rows, exports.thumbnails(self.images, rows, SMALL), strict=True):
            given, suggested = (self.names[k[row]] for k in (self.images.labels_given, self.suspects.suggested))
            alt = f"{self.images.ids[row]}, labelled {given}, suggested {suggested}"
            about = {"alt": alt, "text": f"{given} → {suggested}"}
            shown.append({"picture": _address(picture), "crisp": _crisp(picture)} | about)
        return shown

    def facts(self) -> str:
        """Return what is known of the one in hand, as HTML."""
        row = self.queue.row
        if row is None:
            return "<p>No suspect fits: choose other labels, scores or states.</p>"
        given, suggested = self.images.labels_given[row], int(self.suspects.suggested[row])
        about = ["", ""]
        if self.found.probs is not None:
            about = [f" ({self.found.probs[row, k]:.1%} probable)" for k in (given, suggested)]
        lines = [
            ("ptglab-is-given", "given label", self.names[given] + about[0]),
            ("ptglab-is-suggested", "suggested label", self.names[suggested] + about[1]),
            ("", "decided", self.mark(row) or "nothing yet"),
            ("ptglab-small", f"score of {self.detector}", f"{self.suspects.score[row]:.3g}"),
            ("ptglab-small", "id", self.images.ids[row]),
        ]
        rows = (f'<div class="{c}"><dt>{escape(t)}</dt><dd><bdi>{escape(v)}</bdi></dd></div>' for c, t, v in lines)
        return f'<dl class="ptglab-facts">{"".join(rows)}</dl>'

    def large(self) -> str:
        """Return the picture in hand, as HTML."""
        row = self.queue.row
        if row is None:
            return ""
        picture = exports.thumbnails(self.images, [row], LARGE)[0]
        return image(picture, f"{self.images.ids[row]}, labelled {self.names[self.images.labels_given[row]]}")

    def near(self, number: int = 8) -> str:
        """Return the images most similar to the one in hand, with their labels, as HTML; see neighbours.nearest."""
        row = self.queue.row
        if row is None:
            return ""
        features = self.found.features
        similarity, index = neighbours.nearest(features[row : row + 1], number + 1, features)
        others = [(i, s) for i, s in zip(index[0], similarity[0], strict=True) if i != row][:number]
        cells = []
        for (i, s), picture in zip(others, exports.thumbnails(self.images, [i for i, _ in others], SMALL), strict=True):
            name = self.names[self.images.labels_given[i]]
            about = image(picture, f"{self.images.ids[i]}, labelled {name}")
            words = f"{escape(name)}<br>similarity {s:.2f}"
            cells.append(f"<figure>{about}<figcaption>{words}</figcaption></figure>")
        return f'<div class="ptglab-near" role="group" aria-label="Neighbours">{"".join(cells)}</div>'

    def apply(self) -> str:
        """Write the mended labels beside the decisions; return in words what was written."""
        labels, kept = self.found.apply(self.corrections, self.run)
        changed = int((labels != self.images.labels_given)[kept].sum())
        path = self.run.path / "mended.csv"
        return f"{kept.sum():,} labels are in {path}: {changed:,} changed, {(~kept).sum():,} dropped"

    def train(self):
        """Learn from the given and from the mended labels; return `reopen.compared`."""
        self._before = self._before or self.found.learn(self.images.labels_given)
        labels, kept = self.found.apply(self.corrections, self.run)
        return reopen.compared(self._before, self.found.learn(labels, kept))

    def still(self) -> str:
        """Return the page in hand as HTML without widgets."""
        cells = []
        for row, card in zip(self.page(), self.cards(), strict=True):
            mark = f'<span class="ptglab-mark">{escape(self.mark(row))}</span>'
            picture = _img(card["picture"], card["crisp"], card["alt"])
            cells.append(f'<div class="ptglab-card">{picture}<span>{escape(card["text"])}</span>{mark}</div>')
        head = f'<p class="ptglab-progress">{self.queue.progress()}</p><p>Given → suggested, most suspicious first.</p>'
        page = f'<div class="ptglab-page">{"".join(cells)}</div>'
        return f'<style>{panel.style()}</style><div class="ptglab-still">{head}{page}</div>'

    @functools.cached_property
    def widget(self):
        """The widgets, made when they are asked for first."""
        return panel.Panel(self).box

    def __repr__(self) -> str:
        return f"Review of {self.found.folder}: {self.queue.progress()}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        still = {
            "text/plain": repr(self),
            "text/html": self.still(),
        }  # also for who opens the notebook without a kernel
        return (self.widget._repr_mimebundle_(**kwargs) if live.interactive() else {}) | still
