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

import os
import re
from collections import Counter
from functools import cache
from os.path import isfile, islink, join, realpath
from pathlib import Path

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
LABELS = {"webvision": ["mini", "google", "all"], "clothing1m": ["noisy", "both"], "animal10n": ["label"]}
NAMES = {"webvision": "info/synsets.txt", "clothing1m": "category_names_eng.txt"}
MARKS = {  # what a set and its test split are known by: glob patterns, all of which match in one row or another
    "webvision": (["info/train_filelist_google.txt", "info/train_filelist_flickr.txt"], VALIDATION),
    "clothing1m": (["noisy_label_kv.txt", "annotations/noisy_label_kv.txt"],
                   ["clean_test_key_list.txt", "annotations/clean_test_key_list.txt"]),
    "animal10n": (["training/[0-9]_* testing/[0-9]_*"], ["testing"]),
}  # fmt: skip


def detect(source: Path) -> str | None:
    """Return which of the published sets lies in the folder `source`; None if none."""
    return next((name for name, (marks, _) in MARKS.items() if _first(source, marks)), None)


def splits(source: Path) -> list[str]:
    """Return the splits of a folder that `detect` knows."""
    return ["train", "test"] if _first(source, MARKS[detect(source)][1]) else ["train"]


def class_names(source: Path, labels: str | None) -> list[str]:
    """Return the class names of a folder that `detect` knows, in the order of their numbers, for either split."""
    names, labels = _names(source), _chosen(source, labels)
    return names[:MINI_CLASSES] if labels == "mini" else names


def listing(source: Path, split: str, labels: str | None) -> tuple[dict, dict, dict, list]:
    """Return {id: path}, {id: given label}, {id: true label} (empty if unknown) and [(id, why it is left out)].

    source: a folder that `detect` knows; an id is a path relative to it. Raises InputError naming the line of a list
    that is not as published, and if no listed image is there.
    """
    names = class_names(source, labels)
    given, true = _rows(source, split, _chosen(source, labels))
    home, real, files, left_out = join(realpath(source), ""), cache(realpath), {}, {}
    for path, number in given.items():
        file, worst = join(source, path), min(number, true.get(path, number))
        target = realpath(file) if islink(file) else join(real(os.path.dirname(file)), os.path.basename(file))
        if worst < 0:
            left_out[path] = WHY[worst]
        elif not target.startswith(home):
            left_out[path] = "is behind a link out of the folder, which is not followed: put a copy there"
        elif not isfile(target):
            left_out[path] = "is listed, but there is no such file, or it cannot be opened"
        else:
            files[path] = file
    if not files:
        first = "; the first: {} ({})".format(*next(iter(left_out.items()))) if left_out else ""
        raise InputError(f"{source} holds none of the {len(given):,} images listed for {split}{first}")
    given, true = ({id: names[numbers[id]] for id in files} if numbers else {} for numbers in (given, true))
    return files, given, true, list(left_out.items())


def _rows(source: Path, split: str, labels: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return {path: given class number} and {path: true class number}, which is empty if unknown."""
    layout, classes, test = detect(source), len(_names(source)), split == "test"
    if layout == "animal10n":
        names = sorted(p.name for p in source.glob(f"{split}ing/[!.]*") if p.suffix.lower() in SUFFIXES)
        given = {f"{split}ing/{printable(n)}": int(n[0]) if re.match("[0-9]_", n) else UNKNOWN for n in names}
    elif layout == "webvision":
        inside = {"val_filelist": f"{_first(source, VALIDATION)}/"} if test else {}
        for e in [] if test else ["google", "flickr"] if labels == "all" else ["google"]:
            # google_resized_256.tar holds `google`, which some unpack in a folder of its name, or in `train`
            place = _first(source, [e, f"{e}_resized_256/{e}", f"train/{e}"]) or e
            inside[f"train_filelist_{e}"] = place.removesuffix(e)
        given, most = {}, MINI_CLASSES if labels == "mini" else classes
        for name, folder in inside.items():
            numbers = _numbers(source, f"info/{name}.txt", classes)
            given |= {folder + path: number for path, number in numbers.items() if number < most}
    else:
        kind = "clean" if test else "noisy"
        numbers = _numbers(source, f"{kind}_label_kv.txt", classes)
        if labels == "both" and not test:
            true = _numbers(source, "clean_label_kv.txt", classes)
            held_out = _numbers(source, "clean_test_key_list.txt")
            given = {path: n for path, n in numbers.items() if path in true and path not in held_out}
            return given, {path: true[path] for path in given}
        given = {path: numbers.get(path, UNKNOWN) for path in _numbers(source, f"{kind}_{split}_key_list.txt")}
    return given, given if test else {}


def _first(source: Path, rows: list[str]) -> str | None:
    """Return the first of `rows` whose glob patterns all find something in `source`."""
    return next((row for row in rows if all(next(source.glob(pattern), None) for pattern in row.split())), None)


def _chosen(source: Path, labels: str | None) -> str:
    known = LABELS[detect(source)]
    return one_of(f"label column of {source}", labels or known[0], known)


def _lines(source: Path, name: str) -> list[tuple[int, str]]:
    """Return (line number, line) of the list `name`, there or in `annotations`, without empty lines."""
    file = source / (_first(source, [name, f"annotations/{name}"]) or name)
    if not isfile(file) or not realpath(file).startswith(join(realpath(source), "")):
        raise InputError(f"{source} has no file {name} of its own: put it there, as it was published")
    try:
        lines = small_enough(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    stripped = enumerate((line.replace("\t", " ").strip() for line in lines), 1)
    return [(number, line) for number, line in stripped if line]


def _numbers(source: Path, name: str, classes: int | None = None) -> dict[str, int]:
    """Return {path: class number below `classes`}, AMBIGUOUS where lines differ; without `classes` lines are paths."""
    numbers = {}
    form = "a path from the folder down, without '..'" + (f", and a number from 0 to {classes - 1}" if classes else "")
    for at, line in _lines(source, name):
        path, _, last = line.rpartition(" ") if classes else (line, "", "0")
        if ASTRAY.search(path) or not re.fullmatch("[0-9]{1,9}", last) or int(last) >= (classes or 1):
            raise InputError(f"line {at} of {name} in {source} is '{printable(line[:200])}': it should be {form}")
        if numbers.setdefault(path.rstrip(), int(last)) != int(last):
            numbers[path.rstrip()] = AMBIGUOUS
    return numbers


def _names(source: Path) -> list[str]:
    """Return the names of all classes; the WordNet id before a name stays where names are alike."""
    if not (name := NAMES.get(detect(source))):
        return ANIMALS
    lines = [(number, printable(line)) for number, line in _lines(source, name)]
    times = Counter(bare := [re.sub(r"^n\d{8} +", "", line) for _, line in lines])
    names = [line if times[short] > 1 else short for (_, line), short in zip(lines, bare, strict=True)]
    if not names or lines[-1][0] > len(lines) or len(set(names)) < len(names):
        raise InputError(f"{name} in {source} should name a class in every line, and none twice")
    return names
