"""Image folders: which files there are, which split they belong to, and what their sub-folders or a CSV call them."""

import csv
import os
from pathlib import Path

from ptglab.decode import SUFFIXES
from ptglab.errors import InputError, one_of


def split_folders(source: Path) -> dict[str, Path]:
    """Return {split: folder}; a folder `train` with neither `test` beside it nor classes or a CSV inside is a class."""
    train, test = source / "train", source / "test"
    if train.is_dir() and test.is_dir():
        return {"train": train, "test": test}
    inner = list(train.iterdir()) if train.is_dir() else []
    holds_set = any((p.is_dir() and p.name[0] != ".") or p.suffix == ".csv" for p in inner)
    return {"train": train if holds_set else source}


def listing(folder: Path, labels: str | None) -> tuple[dict, dict, dict, list]:
    """Return {id: path}, {id: given label}, {id: true label} (empty if unknown) and [(id, why it has no label)]."""
    files = {}  # id > path, in sorted order; links are not followed, hidden names are skipped
    for path, inner, names in os.walk(folder):
        inner[:] = sorted(d for d in inner if not d.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                files[(Path(path) / name).relative_to(folder).as_posix()] = Path(path) / name
    if not files:
        raise InputError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    tables = sorted(folder.glob("*.csv"))
    if tables:
        given, true, unreadable = _csv_labels(tables, set(files), labels)
    else:
        if labels:
            raise InputError(f"{folder} has no label column '{labels}': it has no CSV, its labels are its sub-folders")
        given = {id: id.split("/")[0] for id in files if "/" in id}
        true, unreadable = {}, [(id, "lies outside the class folders") for id in files if "/" not in id]
        if not given:
            raise InputError(f"{folder} has no labels: neither one sub-folder a class nor a CSV with columns id,label")
    return files, given, true, unreadable


def _csv_labels(tables: list[Path], files: set[str], labels: str | None) -> tuple[dict, dict, list]:
    """Return {id: given label}, {id: true label} (empty if unknown) and [(id, reason)] from the one CSV."""
    if len(tables) > 1:
        raise InputError(
            f"{tables[0].parent} holds {len(tables)} CSV files; there should be one, with columns id,label"
        )
    table = tables[0]
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is no UTF-8 CSV: {error}") from None
    if "id" not in columns:
        raise InputError(f"{table} has no column 'id': it has {', '.join(columns) or 'none'}")
    name = one_of(f"label column of {table}", labels or "label", [c for c in columns if c != "id"])
    given, true, unreadable, listed = {}, {}, [], set()
    for row in rows:
        id, label = row["id"] or "", row[name]
        if id in listed:
            raise InputError(f"{table} lists '{id}' twice")
        listed.add(id)
        if id not in files:
            unreadable.append((id, f"listed in {table.name}, but there is no such image"))
        elif not label:
            unreadable.append((id, f"has no {name} in {table.name}"))
        else:
            given[id] = label
            if name != "label" and row.get("label"):
                true[id] = row["label"]
    unreadable += [(id, f"not listed in {table.name}") for id in files - listed]
    if not given:
        raise InputError(f"{table} labels none of the images beside it: its ids must be paths relative to the folder")
    return given, true if len(true) == len(given) else {}, unreadable
