"""Tables of labels: CSV and its kin, JSON lines, Excel; which column names the images, which holds the labels."""

import codecs
import csv
import io
import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unicodedata import normalize

from ptglab.errors import InputError, one_of
from ptglab.files import MAX_TABLE, small_enough
from ptglab.text import printable, unescape_formula

ENDINGS = {".csv", ".tsv", ".jsonl", ".ndjson", ".xlsx"}
# Names of columns that are recognised, in any case; of several that may name images, the one that names most does
IDS = ["id", "file_name", "filename", "file", "file_path", "filepath", "path", "image_path", "image_id", "image", "img",
       "name"]  # fmt: skip
LABELS = {"label", "labels", "class", "classes", "class_name", "class_label", "classname", "category", "category_name",
          "target", "species", "breed", "tag"}  # fmt: skip
MISSING = {"", "nan", "none", "null", "na", "n/a", "<na>", "?", "-", "-1", "unknown", "unlabeled", "unlabelled"}
MARKS = {  # byte order marks; those of UTF-32 before those of UTF-16, which they begin with
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
Rows = list[tuple[int, Sequence[str]]]  # the number of a line, and its cells


def labels(
    table: Path, bases: list[dict[str, str]], wanted: Iterable[str], column: str | None, id_column: str = ""
) -> tuple[dict, dict, dict, list[str]]:
    """Return {id: given label}, {id: true label} (empty if unknown), {id: why it is left out} and notes.

    bases: for each folder that the table's ids may be relative to, {path from there: id} of its images; of them, the
    `wanted` get labels. column: the given one; `label` beside it is then the truth.
    """
    columns, rows, notes = read(table, id_column)
    known = [c for c in columns if c.lower() in IDS]
    if id_column:
        known = [one_of(f"id column of {table}", id_column, [c for c in columns if c])]
    if not known:
        raise InputError(f"{table} has no column 'id': it has {', '.join(columns[:20]) or 'none'}; its first line must "
                         "name the columns, as id,label does, or name it with id_column (--id-column)")  # fmt: skip
    name, times = Counter(filter(None, columns)).most_common(1)[0]
    if times > 1:
        raise InputError(f"{table} has two columns '{name}': name one otherwise")
    finders, wanted = [_finder(base) for base in bases], set(wanted)
    cells = [(line, row, dict(zip(columns, row, strict=False))) for line, row in rows]
    known.sort(key=lambda name: IDS.index(name.lower()) if name.lower() in IDS else 0)
    pairs = [(own, find) for own in known for find in finders]
    own, find = max(pairs, key=lambda pair: sum(pair[1](cell.get(pair[0], "")) in wanted for *_, cell in cells))
    others = [c for c in columns if c not in (own, "")]
    column = label_column(table, others, column)
    if not column and (hot := _one_hot(others, [cell for _, _, cell in cells])):
        column = "label"
        notes.append(f"one-hot columns of {table.name} are the classes: {', '.join(hot)}")
        for _, _, cell in cells:
            cell["label"] = next(c for c in hot if float(cell[c]))
    column = column or one_of(f"label column of {table}", "label", others)
    found, left_out = {}, {}  # id > (given, true)
    for line, row, cell in cells:
        id = find(cell.get(own, ""))
        shown = id or printable(cell.get(own, "").strip())
        pair = tuple(printable(unescape_formula(cell.get(c, "").strip())) for c in (column, "label"))
        if any(row[len(columns) :]):
            left_out[shown] = f"line {line} of {table.name} has {len(row)} fields instead of {len(columns)}"
        elif not id:
            several = "several images are called so" if id is None else "there is no such image"
            left_out[shown] = f"listed in {table.name}, but {several}"
        elif id not in wanted:
            continue
        elif not pair[0]:
            left_out[id] = f"has no {column} in {table.name}"
        elif found.setdefault(id, pair) != pair:
            as_first, as_now = ("/".join(dict.fromkeys(p)) for p in (found[id], pair))
            left_out[id] = f"listed twice in {table.name}, as {as_first} and as {as_now}"
    left_out |= {id: f"not listed in {table.name}" for id in wanted - found.keys() - left_out.keys()}
    kept = {id: pair for id, pair in found.items() if id not in left_out}
    if not kept:
        raise InputError(f"{table} labels none of the images beside it: its ids must be paths relative to the folder, "
                         f"such as {min(wanted)}")  # fmt: skip
    texts = {text for pair in kept.values() for text in pair}
    whole = {text: text.partition(".")[0] for text in texts}  # 1.0 from a spreadsheet
    if all(re.fullmatch(r"\d+(\.0*)?|", text) for text in texts) and len(set(whole.values())) == len(texts):
        kept = {id: tuple(whole[text] for text in pair) for id, pair in kept.items()}
    known = column != "label" and all(true for _, true in kept.values())
    given, true = ({id: pair[i] for id, pair in kept.items()} for i in (0, 1))
    return given, true if known else {}, left_out, notes


def label_column(where: object, columns: list[str], asked: str | None) -> str | None:
    """Return the one of `columns` that holds labels: the one `asked` for, `label`, or the only one called alike.

    Raises InputError if there is none such as `asked`, or if there are several.
    """
    if asked:
        return one_of(f"label column of {where}", asked, columns)
    found = ["label"] if "label" in columns else [c for c in columns if c.lower() in LABELS]
    if len(found) > 1:
        raise InputError(f"{where} has several columns that may hold the labels ({', '.join(found)}): name one with "
                         "labels (--label-column)")  # fmt: skip
    return found[0] if found else None


def _one_hot(columns: list[str], cells: list[dict[str, str]]) -> list[str]:
    """Return those of `columns` that are 1 in one column of each row and 0 in all others; none if there are no such."""
    number = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
    hot = [c for c in columns if all(cell.get(c, "").strip() in number for cell in cells)]
    alone = all(sum(number[cell[c].strip()] for c in hot) == 1 for cell in cells)
    return hot if len(hot) > 1 and cells and alone else []


def _finder(names: dict[str, str]) -> Callable[[str], str | None]:
    """Return a function from what a table calls an image to its id, "" if there is none, None if there are several.

    names: {path: id}. In this order: the path exactly, without an escape, spaces, `./` or backslashes; the tail of a
    path from elsewhere; the name of a file, or either without its ending, if only one image has it.
    """
    composed = {normalize("NFC", name): id for name, id in names.items()} | names
    loose = {}
    for name, id in names.items():
        stem, base = os.path.splitext(name)[0], name.rpartition("/")[2]
        for short in {stem, base, os.path.splitext(base)[0]}:
            loose[short] = id if loose.setdefault(short, id) == id else None

    def find(text: str) -> str | None:
        if text in composed:
            return composed[text]
        bare = text.strip()
        ways = [printable(w) for w in (text, unescape_formula(text), bare, bare.replace("\\", "/").removeprefix("./"))]
        parts = ways[-1].split("/")
        if bare and ".." not in parts:  # a Mac writes accents in two characters
            ways += ["/".join(parts[i:]) for i in range(1, len(parts))]
        forms = [form for way in ways for form in (way, normalize("NFC", way))]
        if exact := next((composed[form] for form in forms if form in composed), ""):
            return exact
        # a bare name may stand for an image anywhere; of a path, some folder has to be the same
        return next((loose[f] for f in forms if f in loose and ".." not in parts and (len(parts) == 1 or "/" in f)), "")

    return find


def in_order(names: Iterable[str]) -> list[str]:
    """Return class names in the order of their numbers if all are numbers, otherwise of their letters."""
    names = list(names)
    numbers = all(name.isdecimal() and len(name) < 4300 for name in names)  # Python reads no longer ones
    return sorted(names, key=lambda name: (int(name), name) if numbers else name)


def oddities(given: Sequence[str]) -> list[str]:
    """Return notes on labels that may not be meant so; nothing is changed."""
    times, notes = Counter(filter(None, given)), []
    alike = {}
    for name in times:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
        if re.fullmatch(r"[+-]?\d{1,15}(\.\d*)?", name):
            alike.setdefault(float(name), []).append(name)
    kinds = {
        "labels that differ in case, spaces or a point only": [" and ".join(n) for n in alike.values() if len(n) > 1],
        "labels that seem to hold several": [n for n in times if re.search(r"[^;|]+[;|][^;|]+", n)],
        "labels that may mean none": [n for n in times if n.lower() in MISSING],
    }
    for what, names in kinds.items():
        if names:
            notes.append(f"{what}, taken as they are: {len(names):,}, the first '{names[0][:80]}'")
    return notes


def read(table: Path, id_column: str = "") -> tuple[list[str], Rows, list[str]]:
    """Return the names of the columns, the rows and notes. Raises InputError if it cannot be read, or is too large."""
    content, ending, notes = small_enough(table).read_bytes(), table.suffix.lower(), []
    kind = "Excel file" if ending == ".xlsx" else "JSON lines" if ending in (".jsonl", ".ndjson") else "UTF-8 CSV"
    try:
        if kind == "Excel file":
            rows = _excel(table)
        else:
            encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
            try:
                text = content.decode(encoding)
            except UnicodeDecodeError:
                text = content.decode("cp1252")
                notes.append(f"{table.name} is no UTF-8 and was read as Windows-1252: look whether accents are right")
            if "\0" in text:
                raise ValueError("it holds NUL characters")
            rows = _json_lines(text) if kind == "JSON lines" else _csv(text.lstrip("\r\n"), id_column)
    except ImportError:
        raise InputError(f"{table} needs openpyxl: pip install openpyxl, or save it as CSV") from None
    except Exception as error:  # whatever a damaged file makes a reader say
        mend = "save it as UTF-8, and close every quote" if kind == "UTF-8 CSV" else "mend it, or save it as CSV"
        raise InputError(f"{table} is no {kind} ({str(error)[:200]}): {mend}") from None
    return [name.strip() for name in rows[0][1]] if rows else [], rows[1:], notes


def _csv(text: str, id_column: str) -> Rows:
    """Return the lines of a CSV with commas, semicolons, tabs or bars, whichever leave the name of an id alone."""
    head, wanted = re.match("[^\r\n]*", text)[0], {id_column.lower()} if id_column else {*IDS}
    heads = {d: {name.strip(' "').lower() for name in head.split(d)} for d in ",;\t|"}
    delimiter = max(heads, key=lambda d: (bool(wanted & heads[d]), len(heads[d])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return [(reader.line_num, row) for row in reader if any(row)]


def _json_lines(text: str) -> Rows:
    """Return JSON lines as rows, of all names in the order they come. Raises ValueError with the line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line).items()
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"line {number} holds no object: {error}") from None
            values = ((name, v[0] if isinstance(v, list) and len(v) == 1 else v) for name, v in record)
            found.append(
                (number, {n: v if isinstance(v, str) else "" if v is None else json.dumps(v) for n, v in values})
            )
    columns = list(dict.fromkeys(name for _, record in found for name in record))
    return [(0, columns), *((number, [record.get(c, "") for c in columns]) for number, record in found)]


def _excel(table: Path) -> Rows:
    """Return the rows of the first sheet of an Excel file. Raises ImportError without openpyxl."""
    import pandas as pd

    with zipfile.ZipFile(table) as archive:
        if (size := sum(info.file_size for info in archive.infolist())) > MAX_TABLE:
            raise ValueError(f"it unpacks to {size:,} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = pd.read_excel(table, header=None, dtype=str, na_filter=False)
    return [(number, row) for number, row in enumerate(frame.to_numpy().tolist(), 1) if any(row)]
