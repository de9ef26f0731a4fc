"""Inputs that nobody would think of: valid ones damaged by rng, each rebuilt from its number alone.

source, labels, kind = build(number, empty_folder)
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_inputs import CLASSES, FORMATS, noise, saved

WORDS = [b"", b"\0", b"\xff", b"\n", b"\r", b'"', b"'", b",", b";", b"\t", b"..", b"../", b"/", b"\\", b"id", b"label",
         b"=1+1", b"nan", b"-1", b"9" * 30, b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"<script>", b"%s", b"{0}",
         b"\x1b[31m", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"IDAT",
         b"../outside.png", b"/etc/passwd", b"PAR1"]  # fmt: skip
KINDS = ("classes", "csv", "lists", "parquet")


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


def build(number: int, folder: Path) -> tuple[Path, str | None, str]:
    """Fill `folder` with what belongs to `number`, and return (source, label column, kind)."""
    rng = np.random.default_rng([2511, number])
    kind, images = KINDS[number % len(KINDS)], [image(rng) for _ in range(rng.integers(2, 9))]
    inside = {"classes": "{0}/{1}", "csv": "{1}", "lists": "google/q0001/{1}", "parquet": "{1}"}[kind]
    names = [f"{i}{suffix}" for i, (suffix, _) in enumerate(images)]
    for i, (name, (_, content)) in enumerate(zip(names, images, strict=True)):
        if kind != "parquet":
            path = folder / inside.format(CLASSES[i % 3], name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if kind == "csv":
        rows = [f"{name},{CLASSES[i % 3]},{i % 2}" for i, name in enumerate(names)]
        (folder / "labels.csv").write_bytes(damaged(rng, "\n".join(["id,label,given", *rows]).encode()))
    elif kind == "parquet":
        column = pa.array([{"bytes": content, "path": "x.png"} for _, content in images])
        odd = [[0, 1, 0.5, None, -1, 3, float("nan")][j] for j in rng.integers(7, size=len(images))]
        table = pa.table({"image": column, "label": odd if number % 8 == 3 else [i % 3 for i in range(len(images))]})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression=str(rng.choice(["snappy", "gzip", "zstd", "none"])))
        (folder / "x.parquet").write_bytes(damaged(rng, buffer.getvalue()) if rng.random() < 0.7 else buffer.getvalue())
        return folder / "x.parquet", None, kind
    elif kind == "lists":
        (folder / "info").mkdir()
        lines = [f"google/q0001/{name} {i % 3}" for i, name in enumerate(names)]
        lists = {"synsets": b"n00000001 a\nn00000002 b\nn00000003 c\n", "train_filelist_flickr": b"",
                 "train_filelist_google": "\n".join(lines).encode()}  # fmt: skip
        hurt = str(rng.choice(["synsets", "train_filelist_google"]))
        for name, content in lists.items():
            (folder / "info" / f"{name}.txt").write_bytes(damaged(rng, content) if name == hurt else content)
        return folder, str(rng.choice(["mini", "google", "all"])), kind
    return folder, None, kind
