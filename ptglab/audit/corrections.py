"""Decisions on labels: each is on disk before the next picture shows, can be undone, and is applied to the labels."""

import csv
import io
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptglab import files
from ptglab.errors import InputError, one_of
from ptglab.text import escape_formula, printable, unescape_formula

DECISIONS = ("keep", "suggestion", "class", "drop", "skip")


class Decision(NamedTuple):
    """One line of the file; `label` is the one to use from now on, empty if the image is dropped or skipped."""

    time: str
    id: str
    given: str
    decision: str
    label: str

    @property
    def changes(self) -> bool:
        """Whether the decision changes the set."""
        return self.decision == "drop" or self.label not in ("", self.given)


HEADER = ",".join(Decision._fields) + "\n"


class Corrections:
    """The decisions in the CSV file at `path`, in the order in which they were taken; the last one of an id counts.

    A decision is appended and on disk before `add` returns; `undo` cuts the last line off. Neither takes longer when
    there are many. A last line without an end was torn by a kill and is cut off. As in every table of ours, text that a
    spreadsheet would run as a formula has an apostrophe before it. Raises InputError if the file is not such a table,
    or if somebody else has written to it in the meantime.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[Decision] = []
        self._of: dict[str, list[Decision]] = {}  # by id, the one that counts last
        self._ends: list[int] = []  # of the header and of each row, in bytes
        content = files.small_enough(self.path).read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            files.write(self.path, lambda temporary: temporary.write_bytes(whole))
        for number, line in enumerate(whole.splitlines(keepends=True), 1):
            self._ends.append(len(line) + (self._ends[-1] if self._ends else 0))
            if number > 1:
                self._keep(self._read(number, line))
            elif line != HEADER.encode():
                raise InputError(f"{path} does not begin with {HEADER.strip()}: give another run_dir, or move it away")

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
        """Return the decision that counts for `id`, or None."""
        return (self._of.get(id) or [None])[-1]

    def standing(self) -> list[Decision]:
        """Return the decision that counts for each id, in the order in which ids were first decided."""
        return list({decision.id: decision for decision in self.rows}.values())

    def add(self, id: str, given: str, decision: str, label: str = "") -> Decision:
        """Append a decision to the file, flush it to the disk, and return it."""
        one_of("decision", decision, DECISIONS)
        for text in (id, given, label):
            if printable(text) != text:
                raise InputError(f"'{printable(text)}' cannot stand in a line of {self.path}: rename it")
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        row, text = Decision(now, id, given, decision, label), io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(map(escape_formula, row))
        line = text.getvalue().encode()
        if not self._ends:
            if self.path.exists() and self.path.stat().st_size:
                raise self._changed()
            files.write(self.path, lambda temporary: temporary.write_text(HEADER))
            self._ends = [len(HEADER)]
        self._change(line)
        self._ends.append(self._ends[-1] + len(line))
        self._keep(row)
        return row

    def undo(self) -> Decision | None:
        """Cut the last decision off the file and return it; None if there is none."""
        if not self.rows:
            return None
        self._change(None)
        self._ends.pop()
        last = self.rows.pop()
        self._of[last.id].pop()
        return last

    def _change(self, line: bytes | None) -> None:
        """Append `line` to the file, all of it or nothing; None cuts the last line off."""
        with files.writing(self.path.parent):
            if not self.path.exists():
                raise self._changed()
            with open(self.path, "r+b", buffering=0) as file:
                if file.seek(0, os.SEEK_END) != self._ends[-1]:
                    raise self._changed()
                try:
                    if line is None:
                        file.truncate(self._ends[-2])
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except BaseException:
                    if line is not None:
                        file.truncate(self._ends[-1])
                    raise

    def _changed(self) -> InputError:
        return InputError(f"{self.path} was changed from elsewhere: run the cell again to read it anew")

    def applied(
        self, rows: Mapping[str, int], labels: np.ndarray, class_names: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (labels int64 [N] after all decisions, which rows are kept, bool [N]).

        rows: the row of each id; labels: the given ones, int64 [N]. Raises InputError if decisions are of another set.
        """
        mended, kept = np.array(labels), np.ones(len(labels), bool)
        numbers = {name: number for number, name in enumerate(class_names)}
        for d in self.standing():
            row = rows.get(d.id)
            if row is None or d.given != class_names[labels[row]] or (d.label and d.label not in numbers):
                raise InputError(f"{self.path} holds decisions on other images or labels, such as '{printable(d.id)}': "
                                 "give another run_dir")  # fmt: skip
            mended[row] = numbers.get(d.label, labels[row])
            kept[row] = d.decision != "drop"
        return mended, kept


class Queue:
    """The suspects to decide on: which ones, in which order, which one is current, how many are decided.

    ids: N texts; given: int64 [N]; class_names: K texts. `order` chooses the suspects; then `rows`, int64 [M], are the
    chosen ones, the most suspicious first, and `place` is the position of the current one among them.
    """

    STATES = ("all", "undecided", "changed", "skipped")

    def __init__(self, corrections: Corrections, ids: list[str], given: np.ndarray, class_names: list[str]):
        self.corrections, self.ids, self.given, self.class_names = corrections, ids, given, class_names
        self.number = {id: row for row, id in enumerate(ids)}
        corrections.applied(self.number, given, class_names)  # refuses those of another set
        self.decided, self.changed, self.skipped, self.chosen = np.zeros((4, len(ids)), bool)
        for decision in corrections.standing():
            self._note(self.number[decision.id])
        self.rows, self.place, self.total = np.arange(0), 0, 0

    def _note(self, row: int) -> None:
        """Note what is now decided about `row`."""
        decision = self.corrections.of(self.ids[row])
        self.decided[row] = decision is not None
        self.changed[row] = decision is not None and decision.changes
        self.skipped[row] = decision is not None and decision.decision == "skip"

    def order(self, score: np.ndarray, chosen: np.ndarray, state: str = "all") -> None:
        """Queue the `chosen` rows, bool [N], those of low `score` first, and go to where the work continues.

        state: one of STATES; only such rows are queued, but progress counts all the chosen ones.
        """
        inside = {"undecided": ~self.decided, "changed": self.changed, "skipped": self.skipped}
        shown = chosen if one_of("state", state, self.STATES) == "all" else chosen & inside[state]
        rows = np.flatnonzero(shown)
        self.rows, self.chosen, self.place = rows[np.argsort(score[rows], kind="stable")], chosen, 0
        self.total = int(chosen.sum())
        if self.corrections.rows:
            self._go_to(self.number[self.corrections.rows[-1].id])
        if len(self.rows) and self.decided[self.row]:
            self._next()

    def _go_to(self, row: int) -> None:
        found = np.flatnonzero(self.rows == row)
        self.place = int(found[0]) if len(found) else self.place

    @property
    def row(self) -> int | None:
        """The current row; None if no suspect is queued."""
        return int(self.rows[self.place]) if len(self.rows) else None

    def progress(self) -> str:
        """Return "37 of 212, 29 changed"."""
        done, changed, skipped = ((what & self.chosen).sum() for what in (self.decided, self.changed, self.skipped))
        return f"{done:,} of {self.total:,}, {changed:,} changed" + (f", {skipped:,} skipped" if skipped else "")

    def decide(self, decision: str, label: int | None = None) -> Decision:
        """Write the decision on the current row to the disk, and go to the next undecided one."""
        row = self.row
        if row is None:
            raise InputError("there is nothing to decide: choose other labels, scores or states")
        given = self.class_names[self.given[row]]
        name = {"drop": "", "skip": "", "keep": given}.get(decision)
        taken = self.corrections.add(self.ids[row], given, decision, self.class_names[label] if name is None else name)
        self._note(row)
        self._next()
        return taken

    def undo(self) -> Decision | None:
        """Take the last decision back, and go to its row if it is queued."""
        taken = self.corrections.undo()
        if taken is not None:
            self._note(self.number[taken.id])
            self._go_to(self.number[taken.id])
        return taken

    def _next(self) -> None:
        """Go to the next undecided row, from the start again after the end; if there is none, to the next row."""
        undecided = np.flatnonzero(~self.decided[self.rows])
        later = undecided[undecided > self.place]
        earlier = undecided[undecided < self.place]
        self.place = int([*later[:1], *earlier[:1], min(self.place + 1, len(self.rows) - 1)][0])
