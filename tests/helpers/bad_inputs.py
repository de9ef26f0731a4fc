"""What people, cameras, archives and spreadsheets leave in folders of images: CASES, each built from its name alone.

    for case in CASES:
        source, labels = case.build(empty_folder)  # what to load, and which column
        case.expected  # "refused", in one line with all of case.words, or "audited", with case.readable images
        case.listed    # how many are left out with a reason, None where that is not planted

Images called `good...` are of one colour, `colour(name)`, and belong to class `label(name)`; so do all others, but
theirs may be any pixels.
"""

import csv
import functools
import io
import json
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "owl")
READ, LISTED, IGNORED, ASK = "read", "listed", "ignored", "ask Pillow"  # the fate of a file

Item = tuple[bytes | Callable[[Path], None], str]  # what a file holds or how it is made, and its fate


@dataclass(frozen=True)
class Case:
    """A way for data to be odd, and what has to come of it."""

    name: str
    build: Callable[[Path], tuple[Path, str | None]] = field(repr=False)  # an empty folder > (source, label column)
    words: tuple[str, ...] = ()  # of the line that refuses it
    count: Callable[[], tuple[int, int | None]] = field(default=lambda: (0, None), repr=False)
    classes: int = len(CLASSES)  # at least, among the readable

    @property
    def expected(self) -> str:
        return "refused" if self.words else "audited"

    @property
    def readable(self) -> int:
        return self.count()[0]

    @property
    def listed(self) -> int | None:
        return self.count()[1]


CASES: list[Case] = []


def label(name: str) -> str:
    return CLASSES[zlib.crc32(os.fsencode(name)) % 3]


def colour(name: str) -> tuple[int, int, int]:
    return tuple(zlib.crc32(os.fsencode(name) + b"!").to_bytes(4, "big")[:3])


def pillow_reads(content: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.convert("RGB").load()
        except Exception:
            return False
    return True


def escaped(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---- images


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(name: str, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    """Return an image of random pixels, 8 to 24 a side unless said, the same for the same `name`."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    width, height = size or rng.integers(8, 25, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def plain(name: str, size: tuple[int, int] = (16, 16)) -> bytes:
    return saved(Image.new("RGB", size, colour(name)), "PNG")


@functools.cache
def good(number: int = 12) -> dict[str, Item]:
    """Return `number` images that are as they should be, a third of them of each class."""
    names = (f"good{i}.png" for i in range(1000))
    chosen, wanted = {}, {c: number // 3 + (i < number % 3) for i, c in enumerate(CLASSES)}
    for name in names:
        if wanted[label(name)]:
            wanted[label(name)] -= 1
            chosen[name] = (plain(name), READ)
    return chosen


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, rows: bytes | None = None) -> bytes:
    """Return a grey PNG file that says it has this size, with `more` chunks before its pixels."""
    pixels = bytes((width + 1) * height) if rows is None else rows
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    inner = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(inner)


# ---- ingredients: {file name: item}


FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def truncated(kind: str, share: float) -> dict[str, Item]:
    """Return four files cut off after `share` of their bytes; none can be read of which half or more is missing."""
    files = {}
    for i in range(4):
        whole = saved(noise(f"{kind}{i}", size=(24, 24)), kind)
        fate = LISTED if share <= 0.5 else ASK
        files[f"cut{i}{FORMATS[kind]}"] = (whole[: int(share * len(whole))], fate)
    return files


def flipped(kind: str, bits: int, seed: int, mode: str = "RGB", **options) -> dict[str, Item]:
    files = {}
    for i in range(6):
        rng = np.random.default_rng([seed, i])
        content = np.frombuffer(saved(noise(f"{kind}{i}", mode), kind, **options), np.uint8).copy()
        content[rng.integers(0, len(content), bits)] ^= 1 << rng.integers(0, 8, bits).astype(np.uint8)
        files[f"bits{seed}{i}{FORMATS[kind]}"] = (content.tobytes(), ASK)
    return files


def _ycck() -> bytes:
    """Return a CMYK JPEG file whose Adobe mark says that it is YCCK."""
    content = saved(noise("ycck", "CMYK"), "JPEG")
    at = content.index(b"Adobe") + 11
    return content[:at] + b"\2" + content[at + 1 :]


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def _frames(kind: str) -> bytes:
    first, second = noise(kind), Image.new("RGB", noise(kind).size)
    return saved(first, kind, save_all=True, append_images=[second])


def _deep() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 16, (12, 12), np.uint16)


DEEP = {
    "grey16.png": lambda: saved(Image.fromarray(_deep()), "PNG"),
    "grey16.tif": lambda: saved(Image.fromarray(_deep()), "TIFF"),
    "nan.tif": lambda: saved(Image.fromarray(np.where(_deep() > 9999, np.nan, np.inf).astype(np.float32)), "TIFF"),
    "grey16.pgm": lambda: b"P5 8 8 65535\n" + bytes(128),
}
MODES = {
    "cmyk.jpg": lambda: saved(noise("cmyk", "CMYK"), "JPEG"),
    "ycck.jpg": _ycck,
    "cmyk.tif": lambda: saved(noise("cmyk", "CMYK"), "TIFF"),
    "palette.png": lambda: saved(noise("p", "P"), "PNG"),
    "palette each.png": lambda: saved(noise("p", "P"), "PNG", transparency=bytes(range(256))),
    "colour key.png": lambda: saved(noise("t"), "PNG", transparency=(1, 2, 3)),
    "la.png": lambda: saved(noise("la", "LA"), "PNG"),
    "bits.tif": lambda: saved(noise("1", "1"), "TIFF", compression="group4"),
    "alpha.png": lambda: saved(noise("a", "RGBA"), "PNG"),
}
MOVING = {f"moving.{kind.lower()}": functools.partial(_frames, kind) for kind in ("GIF", "WEBP", "PNG")}
MOVING |= {"many.tiff": lambda: _frames("TIFF"), "two.jpg": lambda: _frames("MPO")}
TURNED = {
    f"up{i}{suffix}": functools.partial(lambda i, k: saved(noise("up", size=(9, 20)), k, exif=_exif(i)), i, kind)
    for i in range(10)
    for kind, suffix in FORMATS.items()
    if kind not in ("GIF", "BMP")
}
MISNAMED = {
    "really a png.jpg": lambda: plain("x"),
    "really a jpeg.PNG": lambda: saved(noise("x"), "JPEG"),
    "Really.TIFF": lambda: saved(noise("z"), "GIF"),
}
HARMLESS = {
    "bad profile.jpg": lambda: saved(noise("icc"), "JPEG", icc_profile=b"no profile"),
    "cut exif.jpg": lambda: saved(noise("exif"), "JPEG", exif=_exif(6)[:14]),
    "bad exif.jpg": lambda: saved(noise("exif"), "JPEG", exif=b"Exif\0\0" + bytes(range(200))),
    "bad exif.png": lambda: saved(noise("exif"), "PNG", exif=b"MM\0*\xff\xff\xff\xff"),
    "bad name of a profile.png": lambda: png(8, 8, chunk(b"tEXt", b"Raw profile type exif\0no hex\n\n\nzz")),
}
NOT_IMAGES = {
    "empty.png": b"",
    "a text.png": b"this is a text",
    "a program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    "zeros.bmp": bytes(512),
    "only a mark.png": b"\x89PNG\r\n\x1a\n",
    "no size.png": png(0, 8),
    "a number.pgm": b"P5 8 8 \x1b[31m255\n",
    "a long number.ppm": b"P6 " + b"9" * 4000,
}
BOMBS = {
    "wide and high.png": lambda: png(60_000, 60_000, rows=b""),
    "ninety million.png": lambda: png(9_500, 9_500, rows=b""),
    "four billion.gif": lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",",
    "profile.png": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 25)))),
    "thin.png": lambda: png(1, 70_000),
    "long.png": lambda: png(70_000, 1),
    "cut thin.tif": lambda: saved(Image.new("L", (1, 60_000)), "TIFF")[:5000],
}
SIZES = {
    "dot.png": lambda: png(1, 1),
    "tall.png": lambda: png(1, 3000),
    "longest.png": lambda: png(65_535, 1),
}
NAMES = [
    "a b  c.png", " before.png", "after .png", "it's.png", 'a "quote".png', "a,comma.png", "semi;colon.png",
    "a\nline.png", "a\ttab.png", "a\rreturn.png", "-rf.png", "--help.png", "<img src=x onerror=alert(1)>.png",
    "&lt;b&gt;.png", "猫の写真.png", "Übung.png", "U\u0308bung.png", "صورة قطة.png", "\u202egnp.exe.png",
    "😀👩‍🚀.png", "%2e%2e%2f.png", "=cmd|' C'!A0.png", "$(touch x).png", "`id`.png", "back\\slash.png",
    "x" * 196 + ".png", "猫" * 66 + ".png", "{0}.png", "%s%n.png", "\x01\x7f.png", "\x1b[31mred.png", "{{7*7}}.png",
    "'; DROP TABLE--.png", "\udcff\udcfe.png", "a\u2028b.png", "[1].png", "*.png", "#?.png", "~.png",
    "None.png", "nan.png", "1.0.png", "id.png", "CON.png", "a.png.png", "con\u200btrol.png", "\ufeffmark.png",
]  # fmt: skip
HIDDEN = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._good.png": b"\0\5\x16\7",
    ".hidden.png": b"",
    "notes.txt": b"no image",
    "no suffix": b"",
}
SPECIAL = {
    "pipe.png": (os.mkfifo, LISTED),
    "pipe": (os.mkfifo, IGNORED),
    "socket.jpg": (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), LISTED),
    "nowhere.png": (lambda path: path.symlink_to("nothing.png"), LISTED),
    "to and.png": (lambda path: path.symlink_to("fro.png"), LISTED),
    "fro.png": (lambda path: path.symlink_to("to and.png"), LISTED),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), LISTED),
    "parent": (lambda path: path.symlink_to("..", target_is_directory=True), LISTED),
    "a folder.png": (lambda path: path.mkdir(), IGNORED),
}


def all_read(files: dict[str, Callable[[], bytes]]) -> dict[str, Item]:
    return {name: (make(), READ) for name, make in files.items()}


def named(names: list[str]) -> dict[str, Item]:
    return {name: (plain(name), READ) for name in names}


INGREDIENTS: dict[str, Callable[[], dict[str, Item]]] = {
    "modes": lambda: all_read(MODES),
    "deep modes": lambda: all_read(DEEP),
    "animations": lambda: all_read(MOVING),
    "orientations": lambda: all_read(TURNED),
    "other suffixes": lambda: all_read(MISNAMED),
    "harmless damage": lambda: all_read(HARMLESS),
    "sizes": lambda: all_read(SIZES),
    "no images": lambda: {name: (content, LISTED) for name, content in NOT_IMAGES.items()},
    "bombs": lambda: {name: (make(), LISTED) for name, make in BOMBS.items()},
    "hidden": lambda: {name: (content, IGNORED) for name, content in HIDDEN.items()},
    "special": lambda: dict(SPECIAL),
    "2,000 empty files": lambda: {f"empty{i}.png": (b"", LISTED) for i in range(2000)},
    "names": lambda: named(NAMES),
}
EVERYWHERE = len(INGREDIENTS)  # these come in every layout, the next ones in one
SHARES = (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
INGREDIENTS |= {
    f"{kind} cut at {share:.0%}": functools.partial(truncated, kind, share) for kind in FORMATS for share in SHARES
}
INGREDIENTS |= {
    f"{kind} with {bits} bits turned, {seed}": functools.partial(flipped, kind, bits, seed)
    for kind in FORMATS
    for seed, bits in enumerate((1, 1, 4, 30))
}
INGREDIENTS |= {
    f"TIFF of {compression} with {bits} bits turned": functools.partial(
        flipped, "TIFF", bits, seed, mode="1" if "group" in compression else "RGB", compression=compression
    )
    for seed, compression in enumerate(("group3", "group4", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"), 10)
    for bits in (2, 9)
}


# ---- layouts: {path: what a file there holds, or how it is made}


Tree = dict[str, bytes | Callable[[Path], None]]


def plant(folder: Path, tree: Tree) -> None:
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content(path) if callable(content) else path.write_bytes(content)


def in_classes(files: dict[str, Item], inside: str = "") -> Tree:
    return {f"{inside}{label(name)}/{name}": content for name, (content, _) in files.items()}


def table(rows: list[tuple], delimiter: str = ",", end: str = "\r\n", encoding: str = "utf-8") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue().encode(encoding)


def beside_csv(files: dict[str, Item], inside: str = "", **options) -> Tree:
    """One folder and a CSV, which lists everything but what nobody takes for an image."""
    rows = [(inside + escaped(name), label(name)) for name, (_, fate) in files.items() if fate != IGNORED]
    tree = {inside + name: content for name, (content, _) in files.items()}
    return tree | {"labels.csv": table([("id", "label"), *rows], **options)}


def in_splits(files: dict[str, Item]) -> Tree:
    return in_classes(files, "train/") | in_classes(good(3), "test/")


LAYOUTS = {
    "in classes": in_classes,
    "beside a CSV": beside_csv,
    "in a folder beside a CSV": functools.partial(beside_csv, inside="all/of them/", delimiter=";"),
    "beside a spreadsheet's CSV": functools.partial(beside_csv, delimiter="\t", encoding="utf-16"),
    "in splits": in_splits,
}


def add_files(name: str, layout: str, chosen: tuple[str, ...]) -> None:
    """Add the case of the `chosen` ingredients, with 12 good images, in `layout`; they are made when asked for."""

    def files() -> dict[str, Item]:
        return good() | {file: item for ingredient in chosen for file, item in INGREDIENTS[ingredient]().items()}

    def build(folder: Path) -> tuple[Path, None]:
        plant(folder, LAYOUTS[layout](files()))
        return folder, None

    def count() -> tuple[int, int]:
        sure = [fate for _, fate in files().values() if fate != ASK]
        asked = [pillow_reads(content) for content, fate in files().values() if fate == ASK]
        return sure.count(READ) + asked.count(True), sure.count(LISTED) + asked.count(False)

    CASES.append(Case(f"{name}, {layout}", build, count=functools.cache(count)))


for _i, _name in enumerate(INGREDIENTS):
    for _layout in LAYOUTS if _i < EVERYWHERE else [list(LAYOUTS)[_i % 5]]:
        add_files(_name, _layout, (_name,))
_rng = np.random.default_rng(2511)
for _i in range(40):
    _chosen = tuple(str(name) for name in _rng.choice(list(INGREDIENTS), _rng.integers(2, 6), replace=False))
    add_files(f"mixture {_i} of {' & '.join(_chosen)}", list(LAYOUTS)[_i % 5], _chosen)


# ---- single cases


def refuse(name: str, tree: Tree, *words: str, labels: str | None = None, source: str = "") -> None:
    """Add a case to be refused in a line with all of `words`; `source`: what in the tree is to be loaded."""
    CASES.append(Case(name, lambda folder: (plant(folder, tree), (folder / source, labels))[1], words))


def accept(
    name: str, tree: Tree, readable: int, listed: int = 0, classes: int = 3, labels: str | None = None, source: str = ""
) -> None:
    """Add a case to be audited."""
    build = lambda folder: (plant(folder, tree), (folder / source, labels))[1]  # noqa: E731
    CASES.append(Case(name, build, count=lambda: (readable, listed), classes=classes))


def link(target: str | Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def flat(files: dict[str, Item], inside: str = "") -> Tree:
    return {inside + name: content for name, (content, _) in files.items()}


def rows(*columns: Callable[[str], str]) -> list[tuple]:
    """Return a row a good image: its id and its label, or what the `columns` make of its name."""
    return [tuple(column(name) for column in columns or (str, label)) for name in good()]


CLASSED, FLAT, PIPE, FOLDER = in_classes(good()), flat(good()), os.mkfifo, Path.mkdir
HEADER = ("id", "label")
FIRST = next(iter(good()))
DOT = plain("x")

# ---- folders

refuse("an empty folder", {}, "holds no images", ".png")
refuse("a folder of a name with line ends", {"a\nb": FOLDER}, r"a\nb", "holds no images", source="a\nb")
refuse("no classes", FLAT, "has no labels", "id,label")
refuse("a source with a name too long", {}, "no such file or folder", source="x" * 5000)
refuse("a source with a NUL", {}, "no such file or folder", r"\x00", source="a\0b")
refuse("a pipe called .parquet", {"x.parquet": PIPE}, "neither a folder nor a .parquet file", source="x.parquet")
refuse("an empty train beside test", in_classes(good(), "test/") | {"train": FOLDER}, "train holds no images")

refuse("one class", flat(good(), "cat/"), "one class only, 'cat'", "a table")
accept("strays outside the classes", CLASSED | {"stray.png": DOT, "another.jpg": b""}, 12, 2)
accept("hidden folders and what archives leave", CLASSED | {"._labels.csv": b"\0\5\x16\7"} | {
    f"{junk}/x.png": DOT for junk in (".git", ".ipynb_checkpoints", "__MACOSX", "cat/.small", "cat/@eaDir")
}, 12)  # fmt: skip
accept("train and a test without classes", in_classes(good(), "train/") | {"test/x.png": DOT}, 12)
accept("train and a damaged test", in_classes(good(), "train/") | {"test/l.csv": b"\xff", "test/a/x.png": PIPE}, 12)
accept("train is a class", {f"{'train' if label(n) == 'cat' else label(n)}/{n}": c for n, c in FLAT.items()}, 12)
ODD = "a 'b' \"c\" \n\t 猫 <i> \udcff"
accept("a source with odd letters", in_classes(good(), f"{ODD}/"), 12, source=ODD)
ODD_CLASSES = ["<b onload=alert(1)>", "a\nb", "a\tb", "a,b", 'a "b"', " a", "-a", "猫", "صورة", "\u202ea", "😀",
               "\udcff", "x" * 200, "1.0", "0x10", "²", "٣", "=1+1", "\x1b[31m", "id", "nan", "labels.csv"]  # fmt: skip
for _odd in ODD_CLASSES:
    accept(f"a class called {_odd!a}", CLASSED | {f"{_odd}/{i}.png": DOT for i in range(4)}, 16, classes=4)
accept("two classes alike once printed", CLASSED | {"\udcff/a.png": DOT, "\\xff/a.png": DOT}, 14, classes=5)
accept("classes of many digits", {f"{10 ** (50 * (i % 5))}/{i}.png": DOT for i in range(15)}, 15, classes=5)

# ---- CSVs, beside 12 good images

BAD_TABLES = {  # name: (content, words)
    "is empty": (b"", ("labels.csv has no column 'id'", "none", "first line")),
    "has only a header": (b"id,label\n", ("labels none of the images", "relative to the folder", "good")),
    "has another label": (table([("id", "lable"), *rows()]), ("'label'", "did you mean 'lable'")),
    "has two columns label": (b"id,label,label\na,b,c\n", ("two columns 'label'",)),
    "is in UTF-16 without mark": ("id,label\n".encode("utf-16-le"), ("no UTF-8 CSV", "NUL", "save it as UTF-8")),
    "has NULs": (b"id,label\n" + bytes(99), ("no UTF-8 CSV", "NUL")),
    "has an open quote": (table([HEADER, *rows()]) + b'"a.png,cat\nb.png,dog\n', ("no UTF-8 CSV", "close every quote")),
    "has a huge field": (b"id,label\ngood0.png," + b"x" * 200_000, ("no UTF-8 CSV", "field limit")),
    "has no label": (table([HEADER, *rows(str, lambda name: " ")]), ("labels none of the images",)),
}
for _name, (_content, _words) in BAD_TABLES.items():
    refuse(f"a CSV that {_name}", FLAT | {"labels.csv": _content}, "labels.csv", *_words)

GOOD_TABLES = {  # name: (rows below the header, how many images are read, how many ids are listed)
    "lists what is not there": ([*rows(), ("z.png", "cat"), ("y.png", "dog")], 12, 2),
    "contradicts itself": ([*rows(), (FIRST, "another")], 11, 1),
    "has empty labels": (rows()[:10] + rows(str, lambda name: "")[10:], 10, 2),
    "has short lines": (rows()[:10] + rows(str)[10:], 10, 2),
    "has long lines": (rows()[:10] + rows(str, label, label)[10:], 10, 2),
    "has spaces around": (rows(" {}\t".format, lambda name: f"  {label(name)} "), 12, 0),
    "has ids of lines and escapes": ([*rows(), ("a\nb", "cat"), ("\x1b[31m", "dog")], 12, 2),
    "has ids that climb": ([*rows(), ("../good0.png", "cat"), ("/etc/passwd", "x"), ("C:\\a.png", "x")], 12, 3),
    "has numbers with a point": (rows(str, lambda name: f"{CLASSES.index(label(name))}.0"), 12, 0),
    "has numbers of 5,000 digits": (rows(str, lambda name: f"{CLASSES.index(label(name)) + 1}" * 5000), 12, 0),
}
for _name, (_rows, _readable, _listed) in GOOD_TABLES.items():
    accept(f"a CSV that {_name}", FLAT | {"labels.csv": table([HEADER, *_rows])}, _readable, _listed)
for _encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
    for _separator, _word in {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}.items():
        for _end in ("\n", "\r\n", "\r"):
            _content = table([HEADER, *rows(str, lambda name: f"{label(name)} é")], _separator, _end, _encoding)
            accept(f"a CSV in {_encoding} with {_word} and {_end!a}", FLAT | {"labels.csv": _content}, 12)

LISTED_ALL = table([HEADER, *rows()])
WINDOWS = table([HEADER, *rows(lambda name: f"{label(name)}\\{name}", label)])
accept("a CSV with the separators of Windows", CLASSED | {"labels.csv": WINDOWS}, 12)
accept("a CSV of an odd name", FLAT | {"a\n\x1b\udcff.csv": table([HEADER, *rows()[:9]])}, 9, 3)
accept("a folder called .csv", FLAT | {"labels.csv": LISTED_ALL, "more.csv": FOLDER}, 12)
refuse("two CSVs", FLAT | {"a.csv": LISTED_ALL, "b.csv": LISTED_ALL}, "2 tables (a.csv, b.csv)", "there should be one")
refuse("a CSV that is a link to nothing", FLAT | {"labels.csv": link("none")}, "labels.csv is no file of that folder")
refuse("a CSV that is a link out of the folder", flat(good(), "in/") | {"labels.csv": LISTED_ALL, "in/labels.csv":
       link("../labels.csv")}, "labels.csv is no file of that folder", "put a copy", source="in")  # fmt: skip

# ---- parquet


def parquet(blobs: list | None = None, metadata: str | bytes | None = None, image=None, **columns) -> bytes:
    """Return a file in the Hugging Face layout, of 12 good images that are cats, dogs and owls unless said."""
    blobs = list(FLAT.values()) if blobs is None else blobs
    cells = [None if blob is None else {"bytes": blob, "path": None} for blob in blobs]
    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])) if image is None else image
    features = {"info": {"features": {"label": {"names": CLASSES}}}}
    metadata = json.dumps(features) if metadata is None else metadata
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": image} | columns).replace_schema_metadata({b"huggingface": metadata}), buffer)
    return buffer.getvalue()


NUMBERS = [CLASSES.index(label(name)) for name in good()]
WHOLE = parquet(label=NUMBERS)
UNREADABLE = "no readable parquet file"
BAD_COLUMNS = {  # name: (the labels, words)
    "too large": ([3, *NUMBERS[1:]], ("row 0", "holds 3", "from 0 to 2")),
    "fractions": ([0.5, *NUMBERS[1:]], ("row 0", "holds 0.5", "whole numbers from 0")),
    "lists": ([[i] for i in NUMBERS], ("holds list", "whole numbers from 0")),
    "below -1": ([-2, *NUMBERS[1:]], ("row 0", "holds -2", "from 0 to 2")),
    "missing throughout": (pa.array([None] * 12, pa.int64()), ("no label in any",)),
    "beyond 64 bits": (pa.array([2**64 - 1] * 12, pa.uint64()), ("row 0", "whole numbers from 0")),
}
for _name, (_labels, _words) in BAD_COLUMNS.items():
    refuse(f"parquet labels that are {_name}", {"x.parquet": parquet(label=_labels)}, "x.parquet", "'label'", *_words,
           source="x.parquet")  # fmt: skip
GOOD_COLUMNS = {  # name: (the labels, how many are missing, how many classes there are)
    "floats": (pa.array(NUMBERS, pa.float64()), 0, 3),
    "booleans": ([i > 0 for i in NUMBERS], 0, 2),
    "missing": ([None, None, *NUMBERS[2:]], 2, 3),
    "missing as -1": ([-1, *NUMBERS[1:-1], -1], 2, 3),
    "texts": ([CLASSES[i] for i in NUMBERS], 0, 3),
    "texts with gaps": ([None, "", *(CLASSES[i] for i in NUMBERS[2:])], 2, 3),
    "a dictionary of texts": (pa.array([CLASSES[i] for i in NUMBERS]).dictionary_encode(), 0, 3),
    "a dictionary of numbers": (pa.array(NUMBERS).dictionary_encode(), 0, 3),
}
for _name, (_labels, _missing, _number) in GOOD_COLUMNS.items():
    accept(f"parquet labels that are {_name}", {"x.parquet": parquet(label=_labels)}, 12 - _missing, _missing, _number,
           source="x.parquet")  # fmt: skip
BAD_FILES = {  # name: (content, words)
    "empty": (b"", (UNREADABLE,)),
    **{f"cut at {share:.0%}": (WHOLE[: int(share * len(WHOLE))], (UNREADABLE,)) for share in (0.1, 0.5, 0.9, 0.99)},
    "without rows": (parquet([], label=pa.array([], pa.int64())), ("has no rows",)),
    "with another label": (parquet(labell=NUMBERS), ("did you mean 'labell'",)),
    "with a class name twice": (
        parquet(metadata='{"info": {"features": {"label": {"names": ["a", "a"]}}}}', label=NUMBERS),
        ("class name 'a'",),
    ),
    "with numbers of articles": (
        parquet(metadata="", label=[8 * 10**9 + i for i in NUMBERS]),
        ("a column of labels?",),
    ),
    "without a readable image": (parquet([None, b"", b"no"], label=[0, 1, 2]), ("none of the 3", "it is empty")),
}
for _kind, _cell in {"paths": "a.png", "texts": {"bytes": "a"}, "lists": [1], "missing": None}.items():
    _words = ("no column 'image'", "structs with the binary field 'bytes'", "image (")
    BAD_FILES[f"with images that are {_kind}"] = (parquet(image=pa.array([_cell]), label=[0]), _words)
for _kind, _cell in {"damaged bytes": b"a", "only named": {"path": "a"}}.items():
    BAD_FILES[f"with images that are {_kind}"] = (parquet(image=pa.array([_cell]), label=[0]), ("none of the 1",))
for _name, (_content, _words) in BAD_FILES.items():
    refuse(f"a parquet file {_name}", {"x.parquet": _content}, *_words, source="x.parquet")
for _metadata in ("[]", "null", b"\xff{", "[" * 9999, '{"info": 1}', '{"info": {"features": {"label": {"names": 3}}}}'):
    _tree = {"x.parquet": parquet(metadata=_metadata, label=NUMBERS)}
    accept(f"parquet with the metadata {_metadata[:40]}", _tree, 12, source="x.parquet")
_damaged = [None, *FLAT.values(), b"", b"no", DOT[:40]]
accept("damaged images in parquet", {"a.parquet": parquet(_damaged, label=[0, *NUMBERS, 1, 2, 0])}, 12, 4,
       source="a.parquet")  # fmt: skip
accept("parquet in two files", {f"train-0000{i}-of-00002.parquet": WHOLE for i in range(2)}, 24)
accept("parquet in a folder of a partition", {"label=7/\udcff.parquet": WHOLE}, 12, source="label=7/\udcff.parquet")
accept("a pipe, a folder and hidden files beside parquet", {"train.parquet": WHOLE, "train-1.parquet": PIPE,
       "train-2.parquet": FOLDER, "._train.parquet": b"x", ".cache/train-3.parquet": b"x"}, 12)  # fmt: skip
refuse("parquet damaged in one of two", {"train-0.parquet": WHOLE, "train-1.parquet": b"PAR1"}, "train-1", UNREADABLE)
