"""Inputs that nobody would think of: valid ones damaged by rng, each rebuilt from its number alone.

source, labels, kind = build(number, empty_folder)
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_inputs import CLASSES, FORMATS, NAMES, noise, saved

WORDS = [b"", b"\0", b"\xff", b"\n", b"\r", b'"', b"'", b",", b";", b"\t", b"..", b"../", b"/", b"\\", b"id", b"label",
         b"=1+1", b"nan", b"-1", b"9" * 30, b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"<script>", b"%s", b"{0}",
         b"\x1b[31m", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"IDAT",
         b"../outside.png", b"/etc/passwd", b"PAR1"]  # fmt: skip
KINDS = ("classes", "csv", "csv of odd cells", "parquet", "parquet of odd columns", "lists", "names")


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """Return `content` with one to eight changes: bits, bytes, words, runs, cuts, copies, moves."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
        word = WORDS[rng.integers(len(WORDS))]
        match rng.integers(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.integers(8)
            case 1 if at < len(data):
                data[at] = rng.integers(256)
            case 2:
                data[at:at] = word
            case 3:
                data[at : at + len(word)] = word
            case 4:
                del data[at : at + length]
            case 5:
                data[at : at + length] = bytes([rng.choice([0, 255])]) * length
            case 6:
                data[at:at] = data[int(rng.integers(len(data) + 1)) :][:length]
            case 7 if rng.random() < 0.3:
                del data[at:]
            case 8:
                data[at:at] = rng.bytes(length)
    return bytes(data)


def image(rng: np.random.Generator, share: float = 0.6) -> tuple[str, bytes]:
    """Return (suffix, file) of a small image of any format, damaged with a chance of `share`."""
    kind = list(FORMATS)[rng.integers(len(FORMATS))]
    mode = rng.choice(["RGB", "L", "P", "RGBA", "1"] if kind in ("PNG", "TIFF") else ["RGB", "L"])
    content = saved(noise(str(rng.integers(1000)), str(mode)), kind)
    return FORMATS[kind], damaged(rng, content) if rng.random() < share else content


def cell(rng: np.random.Generator) -> str:
    """Return a text for a cell or a name: a word, an odd name, or letters of any kind."""
    match rng.integers(3):
        case 0:
            return WORDS[rng.integers(len(WORDS))].decode("utf-8", "surrogateescape")
        case 1:
            return NAMES[rng.integers(len(NAMES))]
    return "".join(chr(c) for c in rng.integers(1, 0x3000, rng.integers(0, 12)))


def file_name(rng: np.random.Generator) -> str:
    """Return a name that a file can have, without suffix."""
    name = cell(rng).replace("/", "").replace("\0", "").encode("utf-8", "surrogateescape")[:200]
    return os.fsdecode(name) if name not in (b"", b".", b"..") else "x"


def build(number: int, folder: Path) -> tuple[Path, str | None, str]:
    """Fill `folder` with what belongs to `number`, and return (source, label column, kind)."""
    rng = np.random.default_rng([2511, number])
    kind = KINDS[number % len(KINDS)]
    images = [image(rng) for _ in range(rng.integers(2, 9))]
    labels = None
    if kind in ("classes", "names"):
        for i, (suffix, content) in enumerate(images):
            odd = kind == "names"
            inside = folder / (file_name(rng) if odd and i % 2 else CLASSES[i % 3])
            inside.mkdir(parents=True, exist_ok=True)
            (inside / ((file_name(rng) if odd else str(i)) + suffix)).write_bytes(content)
        return folder, None, kind
    if kind.startswith("csv"):
        names = [f"{i}{suffix}" for i, (suffix, _) in enumerate(images)]
        for name, (_, content) in zip(names, images, strict=True):
            (folder / name).write_bytes(content)
        rows = [f"{name},{CLASSES[i % 3]},{i % 2}" for i, name in enumerate(names)]
        if kind == "csv of odd cells":
            rows += [f"{cell(rng)},{cell(rng)},{cell(rng)}" for _ in range(4)]
            rows = [rows[i] for i in rng.permutation(len(rows))]
            labels = str(rng.choice(["given", "label", "id", "", "other"]))
        table = "\n".join(["id,label,given", *rows]).encode("utf-8", "surrogateescape")
        (folder / "labels.csv").write_bytes(damaged(rng, table) if kind == "csv" else table)
        return folder, labels, kind
    if kind.startswith("parquet"):
        column = pa.array([{"bytes": content, "path": cell(rng).encode("utf-8", "replace").decode()}
                           for _, content in images])  # fmt: skip
        values = [[0, 1, 0.5, None, -1, 3, float("nan")][j] for j in rng.integers(7, size=len(images))]
        odd = kind == "parquet of odd columns"
        table = pa.table({"image": column, "label": values if odd else [i % 3 for i in range(len(images))]})
        names = {"info": {"features": {"label": {"names": [cell(rng) for _ in range(4)]}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)}) if odd else table
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression=str(rng.choice(["snappy", "gzip", "zstd", "none"])))
        content = buffer.getvalue()
        (folder / "x.parquet").write_bytes(content if odd else damaged(rng, content))
        return folder / "x.parquet", None, kind
    (folder / "info").mkdir()
    lines = [b"google/q0001/%d%s %d" % (i, suffix.encode(), i % 3) for i, (suffix, _) in enumerate(images)]
    (folder / "google" / "q0001").mkdir(parents=True)
    for i, (suffix, content) in enumerate(images):
        (folder / "google" / "q0001" / f"{i}{suffix}").write_bytes(content)
    lists = {"synsets": b"n00000001 a\nn00000002 b\nn00000003 c\n", "train_filelist_google": b"\n".join(lines),
             "train_filelist_flickr": b""}  # fmt: skip
    hurt = str(rng.choice(["synsets", "train_filelist_google"]))
    for name, content in lists.items():
        (folder / "info" / f"{name}.txt").write_bytes(damaged(rng, content) if name == hurt else content)
    return folder, str(rng.choice(["mini", "google", "all"])), kind
