"""Sets with real label noise in the folders they are published in: WebVision 1.0, Clothing1M and ANIMAL-10N.

Lists of paths and class numbers say what each image is labelled; in ANIMAL-10N the file names do. What `labels` may be,
the first of each unless said, and the images that `train` then holds:

    webvision   mini     Google's images of the first 50 classes, as in arXiv 1712.05055
                google   Google's images of all classes
                all      Google's and Flickr's images of all classes
    clothing1m  noisy    those of noisy_train_key_list.txt
                both     those with a noisy label, the given one, and a clean one, the truth; none of `test`
    animal10n   label    those of training/

The truth of `train` is known for `both` only. `test` is WebVision's validation set (of the same classes), the images of
clean_test_key_list.txt, or testing/; its labels count as true. Classes keep their published numbers.
Sources: Li et al. 2017 (arXiv 1708.02862); Xiao et al. (CVPR 2015); Song et al. (ICML 2019).
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from os.path import isfile, islink, join, realpath
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from ptglab.data.decode import SUFFIXES
from ptglab.errors import InputError, one_of
from ptglab.files import small_enough
from ptglab.text import UNPRINTABLE, printable

MINI_CLASSES = 50
VALIDATION = ["val_images_256", "val_images", "val"]  # of the resized release, of the original one, and as some call it
# The order of https://dm.kaist.ac.kr/datasets/animal-10n; one user of it takes 4 for the jaguar, 5 for the cheetah
ANIMALS = ["cat", "lynx", "wolf", "coyote", "cheetah", "jaguar", "chimpanzee", "orangutan", "hamster", "guinea pig"]
ASTRAY = re.compile(rf"\\|(?:^|/)\.{{0,2}}(?:/|$)|{UNPRINTABLE.pattern}")  # what no path down from a folder has
UNKNOWN, AMBIGUOUS = -1, -2  # instead of a class number
WHY = {UNKNOWN: "has no label", AMBIGUOUS: "is listed twice, with different labels"}
NO_FILE = "is listed, but there is no such file"


def detect(source: Path) -> str | None:
    """Return which of LAYOUTS the folder `source` has; None if none."""
    return next((name for name, layout in LAYOUTS.items() if _any(source, layout.marks)), None)


def splits(source: Path) -> list[str]:
    """Return the splits of a folder that `detect` knows."""
    return ["train", "test"] if _any(source, LAYOUTS[detect(source)].tested) else ["train"]


def class_names(source: Path, labels: str | None) -> list[str]:
    """Return the class names of a folder that `detect` knows, in the order of their numbers, for either split."""
    layout, labels = _layout(source, labels)
    names = _names(source, layout.names) if layout.names else ANIMALS
    return names[:MINI_CLASSES] if labels == "mini" else names


def listing(source: Path, split: str, labels: str | None) -> tuple[dict, dict, dict, list]:
    """Return {id: path}, {id: given label}, {id: true label} (empty if unknown) and [(id, why it is left out)].

    source: a folder that `detect` knows; an id is a path relative to it. Raises InputError naming the line of a list
    that is not as published, and if no listed image is there.
    """
    names = class_names(source, labels)
    layout, labels = _layout(source, labels)
    given, true = layout.rows(source, split, labels)
    home, real, files, left_out = join(realpath(source), ""), cache(realpath), {}, {}
    for path, number in given.items():
        worst = min(number, true.get(path, number))
        if why := WHY[worst] if worst < 0 else _missing(join(source, path), home, real):
            left_out[path] = why
        else:
            files[path] = join(source, path)
    if not files:
        first = "; the first: {} ({})".format(*next(iter(left_out.items()))) if left_out else ""
        raise InputError(f"{source} holds none of the {len(given):,} images listed for {split}{first}")
    given, true = ({id: names[numbers[id]] for id in files} if numbers else {} for numbers in (given, true))
    return files, given, true, list(left_out.items())


def _webvision(source: Path, split: str, labels: str) -> tuple[dict, dict]:
    classes = len(_names(source, "info/synsets.txt"))
    if split == "test":
        inside = {"val_filelist": f"{_any(source, VALIDATION) or VALIDATION[0]}/"}
    else:  # google_resized_256.tar holds a folder `google`; some unpack it in one of the archive's name, or in `train`
        engines = ["google", "flickr"] if labels == "all" else ["google"]
        places = {e: _any(source, [e, f"{e}_resized_256/{e}", f"train/{e}"]) or e for e in engines}
        inside = {f"train_filelist_{e}": place.removesuffix(e) for e, place in places.items()}
    most = MINI_CLASSES if labels == "mini" else classes
    rows = {folder + path: n for name, folder in inside.items()
            for path, n in _numbers(source, f"info/{name}.txt", classes).items() if n < most}  # fmt: skip
    return rows, rows if split == "test" else {}


def _clothing1m(source: Path, split: str, labels: str) -> tuple[dict, dict]:
    classes, kind = len(_names(source, "category_names_eng.txt")), "noisy" if split == "train" else "clean"
    numbers = _numbers(source, f"{kind}_label_kv.txt", classes)
    if split == "train" and labels == "both":
        true, test = _numbers(source, "clean_label_kv.txt", classes), _numbers(source, "clean_test_key_list.txt")
        given = {path: n for path, n in numbers.items() if path in true and path not in test}
        return given, {path: true[path] for path in given}
    rows = {path: numbers.get(path, UNKNOWN) for path in _numbers(source, f"{kind}_{split}_key_list.txt")}
    return rows, rows if split == "test" else {}


def _animal10n(source: Path, split: str, labels: str) -> tuple[dict, dict]:
    names = sorted(p.name for p in source.glob(f"{split}ing/[!.]*") if p.suffix.lower() in SUFFIXES)
    rows = {f"{split}ing/{printable(n)}": int(n[0]) if re.match("[0-9]_", n) else UNKNOWN for n in names}
    return rows, rows if split == "test" else {}


class Layout(NamedTuple):
    """How a set is published; rows: of folder, split and labels, {path: given number} and {path: true one} if known."""

    labels: list[str]  # that may be asked for
    marks: list[str]  # what it is known by: glob patterns, all of which find something in one of these rows
    tested: list[str]  # what its test split is known by, likewise
    names: str  # the list of class names
    rows: Callable[[Path, str, str], tuple[dict[str, int], dict[str, int]]]


LAYOUTS = {
    "webvision": Layout(
        ["mini", "google", "all"], ["info/train_filelist_google.txt", "info/train_filelist_flickr.txt"],
        VALIDATION, "info/synsets.txt", _webvision),
    "clothing1m": Layout(
        ["noisy", "both"], ["noisy_label_kv.txt", "annotations/noisy_label_kv.txt"],
        ["clean_test_key_list.txt", "annotations/clean_test_key_list.txt"], "category_names_eng.txt", _clothing1m),
    "animal10n": Layout(["label"], ["training/[0-9]_* testing/[0-9]_*"], ["testing"], "", _animal10n),
}  # fmt: skip


def _any(source: Path, rows: list[str]) -> str | None:
    """Return the first of `rows` whose glob patterns all find something in `source`."""
    return next((row for row in rows if all(next(source.glob(pattern), None) for pattern in row.split())), None)


def _layout(source: Path, labels: str | None) -> tuple[Layout, str]:
    layout = LAYOUTS[detect(source)]
    return layout, one_of(f"label column of {source}", labels or layout.labels[0], layout.labels)


def _missing(file: str, home: str, real: Callable[[str], str]) -> str:
    """Return why `file` is not there, or is not followed out of `home`; empty if it is. `real`: a cached realpath."""
    folder, name = os.path.split(file)
    target = realpath(file) if islink(file) else join(real(folder), name)
    if not target.startswith(home):
        return "is behind a link out of the folder, which is not followed: put a copy there"
    try:
        return "" if S_ISREG(os.stat(target).st_mode) else NO_FILE
    except OSError as error:
        lost = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        return NO_FILE if lost else f"cannot be opened: {error.strerror}"


def _lines(source: Path, name: str) -> Iterator[tuple[Path, int, str]]:
    """Yield (file, line number, line) of the list `name`, there or in `annotations`, without empty lines."""
    file = source / name if isfile(source / name) else source / "annotations" / name
    if not isfile(file) or not realpath(file).startswith(join(realpath(source), "")):
        raise InputError(f"{source} has no file {name} of its own: put it there, as it was published")
    try:
        text = small_enough(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.replace("\t", " ").strip():
            yield file, number, line


def _numbers(source: Path, name: str, classes: int | None = None) -> dict[str, int]:
    """Return {path: class number below `classes`}, AMBIGUOUS where lines differ; without `classes` lines are paths."""
    numbers = {}
    form = "a path from the folder down, without '..'" + (f", and a number from 0 to {classes - 1}" if classes else "")
    for file, line_number, line in _lines(source, name):
        path, _, last = line.rpartition(" ") if classes else (line, "", "")
        number = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else UNKNOWN
        if ASTRAY.search(path) or (classes and not 0 <= number < classes):
            raise InputError(f"line {line_number} of {file} is '{printable(line[:200])}': it should be {form}")
        if numbers.setdefault(path.rstrip(), number) != number:
            numbers[path.rstrip()] = AMBIGUOUS
    return numbers


def _names(source: Path, name: str) -> list[str]:
    """Return the class names in a list of one a line; the WordNet id before a name stays where names are alike."""
    lines = [(number, printable(line)) for _, number, line in _lines(source, name)]
    times = Counter(bare := [re.sub(r"^n\d{8} +", "", line) for _, line in lines])
    names = [line if times[name] > 1 else name for (_, line), name in zip(lines, bare, strict=True)]
    if not names or lines[-1][0] > len(lines) or len(set(names)) < len(names):
        raise InputError(f"{name} in {source} should name a class in every line, and none twice")
    return names
