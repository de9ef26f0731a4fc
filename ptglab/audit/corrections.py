"""Decisions on labels: each on disk before the next picture shows, undone from the end, applied to the labels."""

import csv
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptglab import files
from ptglab.errors import InputError, one_of, shown
from ptglab.files import small_enough
from ptglab.text import escape_formula, printable, unescape_formula

DECISIONS = ("keep", "suggestion", "class", "drop", "skip")


class Decision(NamedTuple):
    """A line of the file: label is the one that shall stand, empty where the image is dropped or skipped."""

    time: str
    id: str
    given: str
    decision: str
    label: str

    @property
    def changes(self) -> bool:
        """Whether the set will be another one for it."""
        return self.decision == "drop" or self.label not in ("", self.given)


HEADER = ",".join(Decision._fields) + "\n"


class Corrections:
    """The decisions in the CSV file at `path`, in the order in which they were taken; the last one of an id stands.

    A decision is added to the end and on disk before `add` returns; `undo` cuts the last line off. Neither depends on
    how many there are. A last line without an end was torn by a kill and is cut off. As in every table of ours, what
    a spreadsheet would take for a formula has an apostrophe before it. Raises InputError for a file that is no such
    one, and when somebody else has written to it meanwhile.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[Decision] = []
        self._of: dict[str, list[Decision]] = {}  # by id, the standing one last
        content = small_enough(self.path).read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            files.write(self.path, lambda temporary: temporary.write_bytes(whole))
        self._ends = [0]  # of the header, and of each row, in bytes
        lines = whole.splitlines(keepends=True)
        if lines and lines[0] != HEADER.encode():
            raise InputError(f"{self.path} does not begin with {HEADER.strip()}: give another run_dir, or move it away")
        for number, line in enumerate(lines, 1):
            self._ends.append(self._ends[-1] + len(line))
            if number > 1:
                self._keep(self._read(number, line))
        self._ends = self._ends[1:] or [0]

    def _read(self, number: int, line: bytes) -> Decision:
        try:
            [cells] = csv.reader([line.decode().removesuffix("\n")], strict=True)
            decision = Decision(*map(unescape_formula, cells))
            if decision.decision in DECISIONS:
                return decision
        except (UnicodeDecodeError, ValueError, TypeError, csv.Error):
            pass
        raise InputError(f"line {number} of {self.path} is no decision: mend that line, or move the file away")

    def _keep(self, decision: Decision) -> None:
        self.rows.append(decision)
        self._of.setdefault(decision.id, []).append(decision)

    def of(self, id: str) -> Decision | None:
        """Return the decision that stands for `id`, if there is one."""
        return self._of.get(id, [None])[-1]

    def standing(self) -> list[Decision]:
        """Return the decision that stands for each id, in the order in which ids were first decided."""
        return [decisions[-1] for decisions in self._of.values()]

    def add(self, id: str, given: str, decision: str, label: str = "") -> Decision:
        """Write a decision to the end of the file, to the disk, and return it."""
        one_of("decision", decision, DECISIONS)
        for text in (id, given, label):
            if printable(text) != text:
                raise InputError(f"'{shown(text)}' cannot stand in a line of {self.path}: rename it")
        seconds = time.time()
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03}Z"
        row, text = Decision(now, id, given, decision, label), io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(map(escape_formula, row))
        line = text.getvalue().encode()
        if self._ends == [0]:
            if self.path.exists() and self.path.stat().st_size:
                raise self._changed()
            files.write(self.path, lambda temporary: temporary.write_bytes(HEADER.encode() + line))
            self._ends = [len(HEADER)]
        else:
            self._change(line)
        self._ends.append(self._ends[-1] + len(line))
        self._keep(row)
        return row

    def undo(self) -> Decision | None:
        """Take the last decision back, on disk, and return it; None if there is none."""
        if not self.rows:
            return None
        self._change(None)
        self._ends.pop()
        last = self.rows.pop()
        self._of[last.id].pop()
        if not self._of[last.id]:
            del self._of[last.id]
        return last

    def _change(self, line: bytes | None) -> None:
        """Add `line` to the end of the file, all of it or nothing; None cuts the last line off."""
        end = self._ends[-1]
        with files.writing(self.path.parent):
            if not self.path.exists():
                raise self._changed()
            with open(self.path, "r+b", buffering=0) as file:
                if file.seek(0, os.SEEK_END) != end:
                    raise self._changed()
                try:
                    if line is None:
                        file.truncate(self._ends[-2])
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except BaseException:
                    if line is not None:
                        file.truncate(end)
                    raise

    def _changed(self) -> InputError:
        return InputError(f"{self.path} was changed from elsewhere: run the cell again, it goes on from there")

    def applied(
        self, rows: Mapping[str, int], labels: np.ndarray, class_names: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (labels int64 [N] as they were decided, which rows are kept, bool [N]).

        rows: the row of each id; labels: the given ones, int64 [N]. Raises InputError if decisions are of another set.
        """
        mended, kept = np.array(labels), np.ones(len(labels), bool)
        numbers = {name: number for number, name in enumerate(class_names)}
        for d in self.standing():
            row = rows.get(d.id)
            if row is None or d.given != class_names[labels[row]] or (d.label and d.label not in numbers):
                raise InputError(f"{self.path} holds decisions on other images or labels, such as '{shown(d.id)}': "
                                 "give another run_dir")  # fmt: skip
            mended[row] = numbers.get(d.label, labels[row])
            kept[row] = d.decision != "drop"
        return mended, kept


class Queue:
    """The suspects in hand: which ones, in which order, which one is next, how many are decided.

    ids: N texts; given: int64 [N]; class_names: K texts. `order` chooses them; then `rows`, int64 [M], are the chosen
    ones, the most suspicious first, and `place` is that of the one in hand among them. A decision costs the same for
    ten and for 100,000 of them.
    """

    def __init__(self, corrections: Corrections, ids: list[str], given: np.ndarray, class_names: list[str]):
        self.corrections, self.ids, self.given, self.class_names = corrections, ids, given, class_names
        self.number = {id: row for row, id in enumerate(ids)}
        corrections.applied(self.number, given, class_names)  # refuses those of another set
        self.decided, self.changed, self.skipped = np.zeros((3, len(ids)), bool)
        for decision in corrections.standing():
            self._note(self.number[decision.id], decision)
        self.rows, self.place, self.inside = np.arange(0), 0, np.zeros(len(ids), bool)
        self.total = self.done = self.changes = self.skips = 0

    def _note(self, row: int, decision: Decision | None) -> None:
        self.decided[row] = decision is not None
        self.changed[row] = decision is not None and decision.changes
        self.skipped[row] = decision is not None and decision.decision == "skip"

    STATES = ("all", "undecided", "changed", "skipped")

    def order(self, score: np.ndarray, chosen: np.ndarray, state: str = "all") -> None:
        """Put the `chosen` rows, bool [N], in hand, those of low `score` first, and go to where the work goes on.

        state: one of STATES, of which only those are shown; progress counts all that are chosen.
        """
        shown_rows = {
            "all": chosen, "undecided": chosen & ~self.decided, "changed": chosen & self.changed,
            "skipped": chosen & self.skipped,
        }[one_of("state", state, self.STATES)]  # fmt: skip
        rows = np.flatnonzero(shown_rows)
        self.rows = rows[np.argsort(score[rows], kind="stable")]
        self.inside, self.total = chosen, int(chosen.sum())
        self.done, self.changes, self.skips = (
            int((what & chosen).sum()) for what in (self.decided, self.changed, self.skipped)
        )
        self.place = 0
        last = self.corrections.rows[-1].id if self.corrections.rows else None
        if last is not None and not self._go_to(self.number[last]):
            self.place = 0
        if len(self.rows) and self.decided[self.row]:
            self._next()

    def _go_to(self, row: int) -> bool:
        found = np.flatnonzero(self.rows == row)
        self.place = int(found[0]) if len(found) else self.place
        return bool(len(found))

    @property
    def row(self) -> int | None:
        """The row in hand; None if no suspect is chosen."""
        return int(self.rows[self.place]) if len(self.rows) else None

    def progress(self) -> str:
        """Return "37 of 212, 29 changed"."""
        skipped = f", {self.skips:,} skipped" if self.skips else ""
        return f"{self.done:,} of {self.total:,}, {self.changes:,} changed{skipped}"

    def decide(self, decision: str, label: int | None = None) -> Decision:
        """Write the decision on the row in hand to the disk, and go to the next undecided one."""
        row = self.row
        if row is None:
            raise InputError("there is nothing to decide: choose other labels, scores or states")
        given = self.class_names[self.given[row]]
        name = {"drop": "", "skip": "", "keep": given}.get(decision)
        taken = self.corrections.add(self.ids[row], given, decision, self.class_names[label] if name is None else name)
        self._count(row, taken)
        self._next()
        return taken

    def undo(self) -> Decision | None:
        """Take the last decision back, and go to its row, if it is among those in hand."""
        taken = self.corrections.undo()
        if taken is not None:
            row = self.number[taken.id]
            self._count(row, self.corrections.of(taken.id))
            self._go_to(row)
        return taken

    def _count(self, row: int, decision: Decision | None) -> None:
        """Note what is now decided of `row`, and count it."""
        before = self.decided[row], self.changed[row], self.skipped[row]
        self._note(row, decision)
        if self.inside[row]:
            self.done += int(self.decided[row]) - int(before[0])
            self.changes += int(self.changed[row]) - int(before[1])
            self.skips += int(self.skipped[row]) - int(before[2])

    def _next(self) -> None:
        """Go to the next undecided one, from the start again after the end; to the one after it if there is none."""
        for place in range(self.place + 1, len(self.rows)):
            if not self.decided[self.rows[place]]:
                self.place = place
                return
        earlier = np.flatnonzero(~self.decided[self.rows[: self.place]])
        self.place = int(earlier[0]) if len(earlier) else min(self.place + 1, len(self.rows) - 1)
