"""Image folders: which files there are, which split they belong to, and what their sub-folders or a table call them."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ptglab.data import tables
from ptglab.data.decode import SUFFIXES
from ptglab.errors import InputError, one_of
from ptglab.text import printable

JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}  # archives and file servers leave thumbnails in them
ROLES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
         "test": "test", "testing": "test", "eval": "test"}  # fmt: skip
HIDDEN, RUN = "hidden", "run folders of ptglab"  # why a folder is not looked into, and needs no line of its own
NO_FILE, OUT = "is no regular file, nor a link to one", "is a link out of the folder, which is not followed"


@dataclass
class Split:
    """What one walk has found in a source, or the part of it that is a split; ids are relative to the source."""

    source: Path
    home: str  # the real path of the source, which links may not lead out of
    inside: str = ""  # what the ids of a split begin with, such as `train/`
    files: dict[str, str] = field(default_factory=dict)  # {id: path} of the image files
    left_out: dict[str, str] = field(default_factory=dict)  # {id: why} of those that cannot be opened
    others: dict[str, str] = field(default_factory=dict)  # {id: ending or what else it is} of files that are no images
    closed: dict[str, str] = field(default_factory=dict)  # {id: why} of folders that are not looked into
    tables: dict[str, str] = field(default_factory=dict)  # {id: path} of what may be a table of labels
    parquet: dict[str, str] = field(default_factory=dict)  # {id: path}
    folders: dict[str, str] = field(default_factory=dict)  # {id: path}
    whole: dict[str, str] = field(default_factory=dict)  # {id: path} of the image files of all splits

    @property
    def folder(self) -> Path:
        return self.source / self.inside

    def part(self, name: str) -> "Split":
        """Return what of this lies in the folder `name`; tables of labels may also lie beside that folder."""
        inside = f"{name}/"
        names = ("files", "left_out", "others", "closed", "folders")
        cut = {n: {id: v for id, v in getattr(self, n).items() if f"{id}/".startswith(inside)} for n in names}
        own, beside = ({i: p for i, p in self.tables.items() if os.path.dirname(i) == at} for at in (name, ""))
        return replace(self, inside=inside, tables=own or beside, **cut)


def scan(source: Path) -> Split:
    """Walk once through `source`, a folder or a parquet file, and return what is there.

    An id is the path relative to `source`, with forward slashes and printable; ids come top down and sorted. Hidden
    folders, JUNK and run folders below `source` are not looked into. A link is followed to a file below `source`, and
    to a folder there that is not read under its own name. Raises OSError if `source` cannot be opened; a folder inside
    that cannot is among the closed.
    """
    found = Split(source, os.path.join(os.path.realpath(source), ""))
    if source.is_file():
        found.parquet[source.name] = os.fspath(source)
        return found
    below, links, walked = [("", os.fspath(source), found.home)], [], set()
    while below or links:
        inside, path, real = below.pop() if below else links.pop(0)
        try:
            entries = {} if real in walked or not real.startswith(found.home) else _entries(path)
        except OSError as error:
            if not inside:
                raise
            found.closed[inside.removesuffix("/")] = f"cannot be opened: {error.strerror}"
            continue
        if real in walked or not real.startswith(found.home):
            where = "is read under its own name" if real in walked else "lies outside, put a copy there"
            found.closed[inside.removesuffix("/")] = f"is a link to a folder of {_number(path)} files, which {where}"
            continue
        walked.add(real)
        if inside and "params.json" in entries and {"environment.json", ".lock"} & entries.keys():
            found.closed[inside.removesuffix("/")] = RUN
            continue
        inner = []
        for name, entry in entries.items():
            id, is_link, hidden = inside + name, entry.is_symlink(), entry.name[0] == "." or entry.name in JUNK
            if entry.is_dir(follow_symlinks=False) and hidden:
                found.closed[id] = HIDDEN
            elif entry.is_dir(follow_symlinks=False):
                found.folders[id] = entry.path
                inner.append((f"{id}/", entry.path, os.path.join(real, entry.name, "")))
            elif is_link and not hidden and os.path.isdir(entry.path):
                links.append((f"{id}/", entry.path, os.path.join(os.path.realpath(entry.path), "")))
            else:
                _sort(found, id, entry, HIDDEN if hidden else os.path.splitext(entry.name)[1].lower(), is_link)
        below += reversed(inner)
    found.whole = found.files
    return found


def _sort(found: Split, id: str, entry: os.DirEntry, suffix: str, is_link: bool) -> None:
    """Put what is no folder where it belongs in `found`."""
    why = "" if (os.path.isfile(entry.path) if is_link else entry.is_file()) else NO_FILE
    if not why and is_link and not os.path.realpath(entry.path).startswith(found.home):
        why = OUT
    if suffix in SUFFIXES and why:
        found.left_out[id] = f"{why}: put a copy there" if why == OUT else why
    elif suffix in SUFFIXES or suffix == ".parquet" and not why:
        (found.files if suffix in SUFFIXES else found.parquet)[id] = entry.path
    else:
        found.others[id] = f"{suffix} that {why}" if suffix == ".parquet" else suffix or "without an ending"
        if suffix in tables.ENDINGS:
            found.tables[id] = entry.path


def _number(folder: str) -> str:
    """Return how many files are below `folder`, counted in a thousand folders at most."""
    walked = list(islice(os.walk(folder), 1001))
    return f"{sum(len(names) for _, _, names in walked):,}" + " or more" * (len(walked) > 1000)


def _entries(folder: str | Path) -> dict[str, os.DirEntry]:
    """Return {printable name: entry}, sorted; a name that has to be escaped is never mistaken for another."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda e: e.name)
    named = {}
    for entry in entries:
        name = printable(entry.name)
        while name in named:  # only if one of the two was escaped, so there is a backslash
            name = name.replace("\\", "\\\\")
        named[name] = entry
    return named


def splits(found: Split) -> dict[str, Split]:
    """Return the splits of a source by role: `train`, `val`, `test`; or `train` alone, which is all of it.

    Two folders of a name in ROLES are splits, or one that holds folders or a table. Beside folders of other names they
    are classes, unless there are two and that of `train` holds folders or a table.
    """
    tops = {id.split("/")[0] for id in found.files if "/" in id}
    named = sorted((n for n in found.folders if n.lower() in ROLES), key=lambda n: list(ROLES).index(n.lower()))
    parts = {}
    for name in named:
        parts[name.lower() if ROLES[name.lower()] in parts else ROLES[name.lower()]] = found.part(name)
    deep = {role for role, part in parts.items() if len(part.folders) > 1 or any("/" in id for id in part.tables)}
    enough = "train" in deep and len(parts) > 1 if tops - set(named) else len(parts) > 1 or bool(deep)
    return parts if enough else {"train": found}


def split_names(parts: dict[str, object]) -> list[str]:
    """Return what the splits are called; without `test`, what is for validation is the test."""
    return ["test" if role == "val" and "test" not in parts else role for role in parts]


def chosen(parts: dict[str, object], split: str, source: str) -> list[str]:
    """Return the roles in `parts` that `split` stands for: one by any of its usual names, or `all` of them."""
    role = split.lower() if split.lower() in parts else ROLES.get(split.lower(), split)
    role = "val" if role == "test" and "test" not in parts else role
    if split != "all" and role not in parts:
        one_of(f"split of {printable(source)}", split, [*split_names(parts), "all"])
    return list(parts) if split == "all" else [role]


def listing(
    split: Split, labels: str | None = None, table: str = "", id_column: str = ""
) -> tuple[dict, dict, dict, list, list]:
    """Return {id: path}, {id: given label}, {id: true label} (empty if unknown), [(id, why it is left out)] and notes.

    The labels come from `table`, or the one table in the folder that names images of the split, or the folders. Raises
    InputError for labels that are hardly meant so: of one class, or of folders that all hold the same folders.
    """
    folder, files, inside, notes = split.folder, split.files, split.inside, []
    left_out = split.left_out | {id: why for id, why in split.closed.items() if why not in (HIDDEN, RUN)}
    if not files:
        why = "; {} left out, the first: {} ({})".format(len(left_out), *min(left_out.items())) if left_out else ""
        raise InputError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}){why}{tail(split.others)}")
    below = {id: id.removeprefix(inside).split("/") for id in files}
    given, true = {id: names[0] for id, names in below.items() if len(names) > 1}, {}
    unlabelled = {id: "lies outside the class folders" for id in files if id not in given}
    asked, read, refused = bool(labels or table or id_column), {}, {}
    there = [path for id, path in split.tables.items() if "/" not in id.removeprefix(inside)]
    for path in [_named(split, table)] if table else there:
        try:
            read[path] = tables.labels(Path(path), _bases(split, path), files, labels, id_column)
        except InputError as error:
            refused[path] = error
    several = read or refused
    if len(read) > 1 or (refused and not read and (asked or len(set(given.values())) < 2)):
        if len(several) == 1:
            raise next(iter(refused.values()))
        names = ", ".join(os.path.basename(path) for path in several)
        raise InputError(f"{folder} holds {len(several)} tables ({names}): there should be one, or name it with table "
                         f"(--table FILE); the first: {next(iter(refused.values()), 'it names images')}")  # fmt: skip
    notes += [f"the table {os.path.basename(path)} is not used: {why}" for path, why in refused.items()]
    if read:
        [(given, true, unlabelled, more)] = read.values()
        notes += more
    elif asked:
        raise InputError(f"{folder} has no label column '{labels or id_column}': it has no CSV or other table, its "
                         "labels are its sub-folders")  # fmt: skip
    else:
        notes += _checked(split, {id: names for id, names in below.items() if len(names) > 1})
    notes += tables.oddities([*given.values(), *true.values()])
    return files, given, true, [(id, printable(why)) for id, why in (unlabelled | left_out).items()], notes


def _named(split: Split, table: str) -> str:
    """Return the path of the table that a person has named, from here or from the source."""
    found = next((p for p in (table, os.path.join(split.source, table)) if os.path.isfile(p)), None)
    if not found:
        raise InputError(f"no such table: {table}")
    return found


def _bases(split: Split, table: str) -> list[dict[str, str]]:
    """Return for each folder that ids in `table` may be relative to, its own first: {path from there: id}."""
    real, source = os.path.realpath(table), split.home
    if table in split.tables.values() and not (os.path.isfile(table) and real.startswith(source)):
        raise InputError(f"{table} is no file of that folder: put a copy there")
    own = os.path.relpath(os.path.dirname(real), source).replace(os.sep, "/") + "/" if real.startswith(source) else "./"
    starts = dict.fromkeys(("" if own == "./" else own, split.inside))
    return [{id[len(start) :]: id for id in split.whole if id.startswith(start)} for start in starts]


def _checked(split: Split, below: dict[str, list[str]]) -> list[str]:
    """Return notes on class folders; `below`: {id: its path from the split down, in parts}.

    Raises InputError, see `listing`.
    """
    folder, inner = split.folder, {}
    for names in below.values():
        inner.setdefault(names[0], set()).add(names[1] if len(names) > 2 else "")
    first, mend = next(iter(inner), ""), "; otherwise a table with columns id,label says what the labels are"
    if len(inner) < 2:
        words = Counter(re.split(r"[\W_]*\d", os.path.basename(id))[0].lower() for id in split.files)
        words = sorted(word for word, times in words.items() if word and times > 1)
        if 1 < len(words) < len(split.files) / 2:
            mend += f", perhaps those that begin the names of the files: {', '.join(words[:5])}"
    if not inner:
        raise InputError(f"{folder} has no labels: neither one sub-folder a class nor a CSV id,label beside them{mend}")
    deepest, depth = folder / first, 1
    while len(inner) == 1:
        names = {path[depth] if len(path) > depth + 1 else "" for path in below.values()}
        if len(names - {""}) > 1:
            raise InputError(f"{folder} holds one class only, '{first}': did you mean {deepest}?{mend}")
        if len(names) > 1 or "" in names:
            elsewhere = {id.split("/")[1] for id in split.whole if not id.startswith(split.inside) and "/" in id}
            if split.inside and first in elsewhere:
                return []
            raise InputError(f"{folder} holds one class only, '{first}': there must be two at least{mend}")
        deepest, depth = deepest / names.pop(), depth + 1
    sets = list(inner.values())
    if len(sets[0]) > 1 and "" not in sets[0] and all(each == sets[0] for each in sets):
        same = ", ".join(sorted(sets[0])[:5])
        raise InputError(f"the {len(sets)} folders of {folder} all hold the same folders ({same}): did you mean "
                         f"{deepest}?{mend}")  # fmt: skip
    if all(len(each) > 1 and "" not in each for each in sets):
        return [f"the labels are the {len(sets)} folders of {folder}, not the {sum(map(len, sets)):,} folders in them: "
                f"did you mean {deepest}?"]  # fmt: skip
    return []


def tail(others: dict[str, str]) -> str:
    """Return what a message adds if some of `others` are images that Pillow does not read."""
    number = sum(ending in (".heic", ".heif") for ending in others.values())
    return f"; {number:,} HEIC images are not read: convert them to JPEG (pillow-heif does)" if number else ""


def elsewhere(found: Split, parts: dict[str, Split], roles: list[str]) -> dict[str, int]:
    """Return how many image and parquet files of a source are not read as images of the splits `roles`, by reason."""
    images = {role: len(part.files) + len(part.left_out) for role, part in parts.items()}
    names = dict(zip(parts, split_names(parts), strict=True))
    fates = {"not opened": sum(len(parts[role].left_out) for role in roles)}
    fates |= {f"in the split {names[role]}": images[role] for role in parts if role not in roles}
    outside = len(found.files) + len(found.left_out) - sum(images.values())
    return fates | {"outside of the splits": outside, ".parquet": len(found.parquet)}


def accounts(found: Split, fates: dict[str, int]) -> list[str]:
    """Return notes on what a source holds beside images, the last of them the sum of its files, all with their fates.

    fates: how many image and parquet files came to what, `used` first.
    """
    kinds = Counter(why for why in found.closed.values() if why in (HIDDEN, RUN))
    notes = [f"not looked into: {', '.join(f'{n:,} {why}' for why, n in kinds.items())}"] if kinds else []
    heic = tail(found.others).removeprefix("; ")
    return [*notes, *[heic] * bool(heic), total("files seen", fates | Counter(found.others.values()))]


def total(what: str, fates: dict[str, int]) -> str:
    """Return the sum of `fates` as a line: 12 files seen = 10 used + 2 unreadable."""
    parts = [f"{number:,} {fate}" for fate, number in fates.items() if number or fate == "used"]
    return f"{sum(fates.values()):,} {what} = {' + '.join(parts)}"
