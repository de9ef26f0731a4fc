"""Image folders: which files there are, which split they belong to, and what their sub-folders or a CSV call them."""

import codecs
import csv
import io
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

from ptglab.data.decode import SUFFIXES
from ptglab.errors import InputError, one_of
from ptglab.files import small_enough
from ptglab.text import printable, unescape_formula

JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}  # archives and file servers leave thumbnails in them
MARKS = {  # byte order marks; those of UTF-32 before those of UTF-16, which they begin with
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


@dataclass
class Split:
    """What one walk has found in the folder of a split, or in a whole source; ids are relative to it."""

    folder: Path
    home: str  # the real path of the source, which links may not lead out of
    files: dict[str, str] = field(default_factory=dict)  # {id: path} of the image files
    left_out: dict[str, str] = field(default_factory=dict)  # {id: why}
    tables: dict[str, str] = field(default_factory=dict)  # {id: path} of the CSVs
    parquet: dict[str, str] = field(default_factory=dict)  # {id: path} of the files that end in .parquet
    folders: dict[str, str] = field(default_factory=dict)

    def inside(self, name: str) -> "Split":
        """Return what of this lies in the folder `name`."""
        everything, below = (self.files, self.left_out, self.tables, self.parquet, self.folders), f"{name}/"
        cut = ({id[len(below) :]: value for id, value in d.items() if id.startswith(below)} for d in everything)
        part = Split(self.folder / name, self.home, *cut)
        if name in self.left_out:  # it cannot be opened
            part.left_out["."] = self.left_out[name]
        return part

    def table(self) -> Path | None:
        """Return the one CSV in the folder itself. Raises InputError if there are more, or if it is no file of it."""
        tables = [path for id, path in self.tables.items() if "/" not in id]
        if len(tables) > 1:
            raise InputError(f"{self.folder} holds {len(tables)} CSV files; there should be one, with columns id,label")
        if tables and not (os.path.isfile(tables[0]) and os.path.realpath(tables[0]).startswith(self.home)):
            raise InputError(f"{tables[0]} is no file of that folder: put a copy there")
        return Path(tables[0]) if tables else None


def scan(source: Path) -> Split:
    """Walk once through `source`, a folder or a parquet file, and return what is there.

    An id is the path relative to `source`, with forward slashes and printable; ids come top down and sorted. Hidden
    names and JUNK are skipped. Links are followed to files below `source` only. Raises OSError if it cannot be opened;
    a folder inside that cannot is among those left out.
    """
    found = Split(source, os.path.join(os.path.realpath(source), ""))
    if source.is_file():
        found.parquet[source.name] = os.fspath(source)
        return found
    below = [("", os.fspath(source))]
    while below:
        inside, path = below.pop()
        try:
            entries = _entries(path)
        except OSError as error:
            if not inside:
                raise
            found.left_out[inside.removesuffix("/")] = f"cannot be opened: {error.strerror}"
            continue
        inner = {inside + name: e.path for name, e in entries.items() if e.is_dir(follow_symlinks=False)}
        found.folders |= inner
        below += [(f"{id}/", path) for id, path in reversed(inner.items())]
        for name, entry in entries.items():
            id, suffix, is_link = inside + name, os.path.splitext(entry.name)[1].lower(), entry.is_symlink()
            is_file = os.path.isfile(entry.path) if is_link else entry.is_file()
            if is_link and os.path.isdir(entry.path):
                found.left_out[id] = "is a link to a folder, which is not followed"
            elif suffix in SUFFIXES and id not in inner and not is_file:
                found.left_out[id] = "is no regular file, nor a link to one"
            elif suffix in SUFFIXES and is_link and not os.path.realpath(entry.path).startswith(found.home):
                found.left_out[id] = "is a link out of the folder, which is not followed: put a copy there"
            elif id not in inner and (suffix == ".csv" or is_file):
                kept = {".csv": found.tables, ".parquet": found.parquet} | dict.fromkeys(SUFFIXES, found.files)
                kept.get(suffix, {})[id] = entry.path
    return found


def _entries(folder: str | Path) -> dict[str, os.DirEntry]:
    """Return {printable name: entry}, sorted; a name that has to be escaped is never mistaken for another."""
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if e.name[0] != "." and e.name not in JUNK), key=lambda e: e.name)
    named = {}
    for entry in entries:
        name = printable(entry.name)
        while name in named:  # only if one of the two was escaped, so there is a backslash
            name = name.replace("\\", "\\\\")
        named[name] = entry
    return named


def splits(found: Split) -> dict[str, Split]:
    """Return the splits of a source: two folders `train` and `test`, or `train` alone, which may be all of it.

    A folder `train` without `test` beside it is the split if it holds folders or a CSV; otherwise it is a class.
    """
    parts = {name: found.inside(name) for name in ("train", "test") if name in found.folders}
    train = parts.get("train")
    return parts if len(parts) == 2 else {"train": train if train and (train.folders or train.table()) else found}


def listing(split: Split, labels: str | None) -> tuple[dict, dict, dict, list]:
    """Return {id: path}, {id: given label}, {id: true label} (empty if unknown) and [(id, why it is left out)]."""
    folder, files, left_out = split.folder, split.files, split.left_out
    if not files:
        why = "; {} left out, the first: {} ({})".format(len(left_out), *min(left_out.items())) if left_out else ""
        raise InputError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}){why}")
    if table := split.table():
        given, true, unlabelled = _csv_labels(table, set(files), labels)
    else:
        if labels:
            raise InputError(f"{folder} has no label column '{labels}': it has no CSV, its labels are its sub-folders")
        given = {id: id.split("/")[0] for id in files if "/" in id}
        true, unlabelled = {}, {id: "lies outside the class folders" for id in files if "/" not in id}
        if not given:
            raise InputError(f"{folder} has no labels: neither one sub-folder a class nor a CSV with columns id,label")
    return files, given, true, [(id, printable(why)) for id, why in (unlabelled | left_out).items()]


def _csv_labels(table: Path, files: set[str], labels: str | None) -> tuple[dict, dict, dict]:
    """Return {id: given label}, {id: true label} (empty if unknown) and {id: why it is left out}."""
    columns, rows = _read_csv(table)
    if "id" not in columns:
        raise InputError(f"{table} has no column 'id': it has {', '.join(columns[:20]) or 'none'}; its first line must "
                         "name the columns, as id,label does")  # fmt: skip
    column, times = Counter(filter(None, columns)).most_common(1)[0]
    if times > 1:
        raise InputError(f"{table} has two columns '{column}': name one otherwise")
    name = one_of(f"label column of {table}", labels or "label", [c for c in columns if c not in ("id", "")])
    composed = {normalize("NFC", id): id for id in files} | dict(zip(files, files, strict=True))
    cells, left_out = {}, {}  # id > (given, true)
    for line, row in rows:
        cell = dict(zip(columns, row, strict=False))
        id = _image_id(cell.get("id", ""), composed)
        pair = tuple(printable(unescape_formula(cell.get(column, "").strip())) for column in (name, "label"))
        if any(row[len(columns) :]):
            left_out[id] = f"line {line} of {table.name} has {len(row)} fields instead of {len(columns)}"
        elif id not in files:
            left_out[id] = f"listed in {table.name}, but there is no such image"
        elif not pair[0]:
            left_out[id] = f"has no {name} in {table.name}"
        elif cells.setdefault(id, pair) != pair:
            as_first, as_now = ("/".join(dict.fromkeys(p)) for p in (cells[id], pair))
            left_out[id] = f"listed twice in {table.name}, as {as_first} and as {as_now}"
    left_out |= {id: f"not listed in {table.name}" for id in files - cells.keys() - left_out.keys()}
    kept = {id: pair for id, pair in cells.items() if id not in left_out}
    if not kept:
        raise InputError(f"{table} labels none of the images beside it: its ids must be paths relative to the folder, "
                         f"such as {min(files)}")  # fmt: skip
    if all(re.fullmatch(r"\d+(\.0*)?|", label) for pair in kept.values() for label in pair):  # 1.0 from a spreadsheet
        kept = {id: tuple(label.partition(".")[0] for label in pair) for id, pair in kept.items()}
    known = name != "label" and all(true for _, true in kept.values())
    given, true = ({id: pair[i] for id, pair in kept.items()} for i in (0, 1))
    return given, true if known else {}, left_out


def _image_id(text: str, composed: dict[str, str]) -> str:
    """Return the id of the image that a CSV calls `text`: exactly, unescaped, without spaces, `./` or backslashes."""
    bare = text.strip()
    ways = [printable(way) for way in (text, unescape_formula(text), bare, bare.replace("\\", "/").removeprefix("./"))]
    names = [name for way in ways for name in (way, normalize("NFC", way))]  # a Mac writes accents in two characters
    return next((composed[name] for name in names if name in composed), ways[2])


def _read_csv(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the column names and [(line, cells)] of a CSV with commas, semicolons, tabs or bars."""
    content = small_enough(table).read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding).lstrip("\r\n")
        if "\0" in text:
            raise csv.Error("it holds NUL characters")
        head = re.match("[^\r\n]*", text)[0]
        delimiter = next((d for d in ",;\t|" if "id" in (name.strip(' "') for name in head.split(d))), ",")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is no UTF-8 CSV ({error}): save it as UTF-8, and close every quote") from None
    return [name.strip() for name in rows[0][1]] if rows else [], rows[1:]
