"""Decisions on labels: each is on disk before the next picture shows, can be undone, and is applied to the labels."""

import csv
import io
import os
from collections.abc import Callable, Mapping
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


HEADER = (",".join(Decision._fields) + "\n").encode()


def _lines(rows: list[Decision]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(escape_formula, row) for row in rows)
    return text.getvalue().encode()


class Corrections:
    """The decisions in the CSV file at `path`, in the order in which they were taken; the last one of an id counts.

    A decision is appended and on disk before `add` returns, and costs the same however many there are. A last line
    without an end was torn by a kill and is cut off. As in every table of ours, text that a spreadsheet would run as a
    formula has an apostrophe before it. Raises InputError if the file is not such a table, or if somebody else has
    written to it in the meantime.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        content = files.small_enough(self.path).read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        header, *lines = whole.splitlines(keepends=True) or [HEADER]
        if header != HEADER:
            named = HEADER.decode().strip()
            raise InputError(f"{path} does not begin with {named}: give another run_dir, or move it away")
        self.rows = [self._read(number, line) for number, line in enumerate(lines, 2)]
        self._last, self._size = {row.id: row for row in self.rows}, len(whole)
        if whole != content:
            files.write(self.path, lambda temporary: temporary.write_bytes(whole))

    def _read(self, number: int, line: bytes) -> Decision:
        try:
            [cells] = csv.reader([line.decode().removesuffix("\n")], strict=True)
            decision = Decision(*map(unescape_formula, cells))
            if decision.decision in DECISIONS:
                return decision
        except (UnicodeDecodeError, ValueError, TypeError, csv.Error):
            pass
        raise InputError(f"line {number} of {self.path} is no decision: mend that line, or move the file away")

    def of(self, id: str) -> Decision | None:
        """Return the decision that counts for `id`, or None."""
        return self._last.get(id)

    def standing(self) -> list[Decision]:
        """Return the decision that counts for each id, in the order in which ids were first decided."""
        return list(self._last.values())

    def add(self, id: str, given: str, decision: str, label: str = "") -> Decision:
        """Append a decision to the file, flush it to the disk, and return it."""
        one_of("decision", decision, DECISIONS)
        for text in (id, given, label):
            if printable(text) != text:
                raise InputError(f"'{printable(text)}' cannot stand in a line of {self.path}: rename it")
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        row = Decision(now, id, given, decision, label)
        if not self._size:
            self._rewrite([])
        self._check()
        line = _lines([row])
        with files.writing(self.path.parent), open(self.path, "r+b", buffering=0) as file:
            file.seek(self._size)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self._size)
                raise
            self._size = file.tell()
        self.rows.append(row)
        self._last[id] = row
        return row

    def undo(self) -> Decision | None:
        """Take the last decision out of the file and return it; None if there is none."""
        if not self.rows:
            return None
        last = self.rows[-1]
        self._rewrite(self.rows[:-1])
        return last

    def set_aside(self, holds: Callable[[Decision], bool]) -> int:
        """Move the decisions that no longer hold to corrections_aside.csv, and return how many there are."""
        gone = [row for row in self.rows if not holds(row)]
        if gone:
            aside = Corrections(self.path.with_name("corrections_aside.csv"))
            aside._rewrite(aside.rows + gone)
            self._rewrite([row for row in self.rows if holds(row)])
        return len(gone)

    def _rewrite(self, rows: list[Decision]) -> None:
        self._check()
        content = HEADER + _lines(rows)
        files.write(self.path, lambda temporary: temporary.write_bytes(content))
        self.rows, self._last, self._size = rows, {row.id: row for row in rows}, len(content)

    def _check(self) -> None:
        if (self.path.stat().st_size if self.path.exists() else 0) != self._size:
            raise InputError(f"{self.path} was changed from elsewhere: run the cell again to read it anew")

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
        self.state = np.ones(len(ids), int)  # of each row, its number in STATES; 0 where the label is kept
        for decision in corrections.standing():
            self._note(decision.id)
        self.rows, self.place, self.chosen = np.arange(0), 0, np.zeros(len(ids), bool)

    def _note(self, id: str) -> int:
        """Note what is now decided about `id`, and return its row."""
        row, now = self.number[id], self.corrections.of(id)
        self.state[row] = 1 if now is None else 3 if now.decision == "skip" else 2 if now.changes else 0
        return row

    def order(self, score: np.ndarray, chosen: np.ndarray, state: str = "all") -> None:
        """Queue the `chosen` rows, bool [N], those of low `score` first, and go to where the work continues.

        state: one of STATES; only such rows are queued, but progress counts all the chosen ones.
        """
        number = self.STATES.index(one_of("state", state, self.STATES))
        rows = np.flatnonzero(chosen & (self.state == number) if number else chosen)
        self.rows, self.chosen, self.place = rows[np.argsort(score[rows], kind="stable")], chosen, 0
        if self.corrections.rows:
            self._go_to(self.number[self.corrections.rows[-1].id])
        if len(self.rows) and self.state[self.row] != 1:
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
        kept, undecided, changed, skipped = np.bincount(self.state[self.chosen], minlength=4)
        done = kept + changed + skipped
        return f"{done:,} of {done + undecided:,}, {changed:,} changed" + (f", {skipped:,} skipped" if skipped else "")

    def decide(self, decision: str, label: int | None = None) -> Decision:
        """Write the decision on the current row to the disk, and go to the next undecided one."""
        row = self.row
        if row is None:
            raise InputError("there is nothing to decide: choose other labels, scores or states")
        given = self.class_names[self.given[row]]
        name = {"drop": "", "skip": "", "keep": given}.get(decision)
        taken = self.corrections.add(self.ids[row], given, decision, self.class_names[label] if name is None else name)
        self._note(taken.id)
        self._next()
        return taken

    def undo(self) -> Decision | None:
        """Take the last decision back, and go to its row if it is queued."""
        taken = self.corrections.undo()
        if taken is not None:
            self._go_to(self._note(taken.id))
        return taken

    def _next(self) -> None:
        """Go to the next undecided row, from the start again after the end; if there is none, to the next row."""
        others = np.roll(np.arange(len(self.rows)), -self.place - 1)[:-1]
        undecided = others[self.state[self.rows[others]] == 1]
        self.place = int(undecided[0]) if len(undecided) else min(self.place + 1, len(self.rows) - 1)
