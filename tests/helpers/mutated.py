"""Run folders as nobody should send them: whole ones with one thing changed, each rebuilt from its number alone."""

import json
import os
import socket
from pathlib import Path

import numpy as np

MANY = 200
VALUES = [10**30, "\x1b[31m$x^{$", [], [1], {}, {"a": 1}, "../../x", "9" * 5000]
DEEP = "[" * 100_000


def changed(rng: np.random.Generator, content: bytes) -> bytes:
    """Return a text file torn, glued, emptied, or with other bytes in it."""
    at = int(rng.integers(len(content)))
    lines = content.split(b"\n")
    return [content[:at], b"", content + content[:at], b"".join(lines), content[:at] + b"\0\xff" + content[at + 3 :],
            DEEP.encode(), content[:at] + b"\n" + content[at:], content.replace(b",", b";"), b"\n" * 1000,
            b'"' + content, lines[0] + b"\n"][int(rng.integers(11))]  # fmt: skip


def other(rng: np.random.Generator, value: object) -> object:
    """Return a value of another type than `value`, or a number that nothing can hold."""
    others = [each for each in VALUES if not (isinstance(value, str) and isinstance(each, str))]
    return others[rng.integers(len(others))]


def mutate(number: int, folder: Path, outside: Path) -> str:
    """Change one thing in a run folder, and return what in words; `outside` is a folder that nothing may touch."""
    rng = np.random.default_rng([2511, number])
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock.txt")
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".csv", ".txt", ".ipynb")]
    kind = ("link", "new link", "pipe", "folder", "size", "bytes", "value", "record", "array", "epoch")[number % 10]
    path = files[rng.integers(len(files))]
    match kind:
        case "link":
            if rng.random() < 0.3 and path.parent != folder:
                path = path.parent
                path.rename(outside / f"moved{number}")
                path.symlink_to(outside / f"moved{number}")
            else:
                path.unlink()
                path.symlink_to([outside / "kept.txt", outside / "missing", "/dev/zero", path][rng.integers(4)])
        case "new link":
            name = str(rng.choice([".lock.txt", ".lock", "log.txt", "cells.csv", ".params.json.1.ptglab.tmp", "figures",
                                   "checkpoint.safetensors", ".running-report.ipynb", "deep/er"]))  # fmt: skip
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(outside / "kept.txt" if "figures" not in name else outside)
        case "pipe":
            path.unlink()
            if rng.random() < 0.7:
                os.mkfifo(path)
            else:
                here = os.open(path.parent, os.O_RDONLY)
                with socket.socket(socket.AF_UNIX) as made:  # its path may be longer than a socket's
                    made.bind(f"/proc/self/fd/{here}/{path.name}")
                os.close(here)
        case "folder":
            path.unlink()
            path.mkdir()
        case "size":
            path = texts[rng.integers(len(texts))]
            os.truncate(path, (1 << 28) + 1)  # takes no place on the disk
        case "bytes":
            path = texts[rng.integers(len(texts))]
            path.write_bytes(changed(rng, path.read_bytes()))
        case "value":
            path = [path for path in files if path.name in ("params.json", "summary.json")][rng.integers(2)]
            held = json.loads(path.read_text())
            name = str(rng.choice(list(held)))
            held[name] = other(rng, held[name])
            path.write_text(json.dumps(held))
        case "record":
            path = folder / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lines[rng.integers(len(lines))][str(rng.choice(["epoch", "loss"]))] = other(rng, 0)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        case "array":
            path = sorted(folder.rglob("*.npy"))[rng.integers(4)]
            content = bytearray(path.read_bytes())
            content[rng.integers(10, 60)] ^= 1 << int(rng.integers(8))
            path.write_bytes(content[: int(rng.integers(len(content) + 1))] if rng.random() < 0.5 else content)
        case "epoch":
            from safetensors.numpy import save_file

            path = folder / "checkpoint.safetensors"
            epoch = str(rng.choice(["4", "-1", "99999999999999999999", "3"]))
            save_file({"x": np.ones(1, np.float32)}, path, metadata={"epoch": epoch})
            kind = f"epoch {epoch}"
    return f"{kind}: {path.relative_to(folder)}"


def state(folder: Path) -> dict:
    """Return what there is below a folder, with the bytes of every file and where links lead."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()}  # fmt: skip
