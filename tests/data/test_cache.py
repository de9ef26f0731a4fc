"""The cache of pixels against decoding in memory: the same set, built once, gone on with after a kill, never stale."""

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from expected import refused
from PIL import Image

from ptglab.data import cache
from ptglab import data
from ptglab.data import sources


def encoded(number: int, side: int = 8, colour: bool = True) -> bytes:
    draws, file = np.random.default_rng(number), io.BytesIO()
    pixels = draws.integers(0, 256, (side, side, 3) if colour else (side, side)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


BROKEN = {3: b"no image", 40: encoded(40)[:70], 41: b"", 110: encoded(110)[:-40]}


def content(n: int) -> list[bytes]:
    """PNG files of mixed kinds, a few of which cannot be read, by their header or only by their pixels."""
    return [BROKEN.get(i) if i in BROKEN else encoded(i, colour=i % 5 > 0) for i in range(n)]


def folder(path, n: int = 130):
    for i, image in enumerate(content(n)):
        (path / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (path / f"{i % 3}" / f"{i:03d}.png").write_bytes(image)
    return path


def parquet(path, n: int = 130, labels=None):
    path.mkdir()
    for part, start in enumerate(range(0, n, 70)):
        rows = range(start, min(n, start + 70))
        images = [{"bytes": image, "path": None} for image in content(n)[rows.start : rows.stop]]
        label = [None if i in (7, 90) else i % 3 for i in rows]
        table = pa.table({"image": images, "label": pa.array(label, pa.int64())})
        pq.write_table(table, path / f"train-0000{part}-of-00002.parquet", row_group_size=9)
    return path


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Every set is large, blocks and what a process holds are small."""
    monkeypatch.setenv("PTGLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LARGE", 0)
    monkeypatch.setattr(sources, "BLOCK", 20)
    return tmp_path / "cache"


def same(ours: data.ImageSet, expected: data.ImageSet) -> None:
    assert ours.images.dtype == expected.images.dtype and ours.images.shape == expected.images.shape
    np.testing.assert_array_equal(ours.images.numpy(), expected.images.numpy())
    np.testing.assert_array_equal(ours.labels_given, expected.labels_given)
    assert (ours.ids, ours.class_names, ours.files) == (expected.ids, expected.class_names, expected.files)
    assert list(ours.unreadable) == list(expected.unreadable) and ours.fingerprint == expected.fingerprint
    assert list(ours.notes)[:-1] == list(expected.notes) and "pixels are kept in" in ours.notes[-1]


def built(place):
    return next(place.glob("*/pixels")).stat().st_mtime_ns


@pytest.mark.parametrize("make", [folder, parquet])
@pytest.mark.parametrize(("sizes", "processes"), [({}, 2), ({"image_size": 5}, 1), ({"at_most": 6}, 1)])
def test_a_cached_set_is_the_one_decoded_in_memory(tmp_path, monkeypatch, cached, make, sizes, processes):
    monkeypatch.setattr(torch, "get_num_threads", lambda: processes)
    source = make(tmp_path / "set")
    ours = data.load(source, **sizes)
    before = built(cached)
    monkeypatch.setattr(cache, "_work", None)  # nothing is decoded again
    again = data.load(source, **sizes)
    assert built(cached) == before
    monkeypatch.setattr(cache, "LARGE", 1 << 30)
    expected = data.load(source, **sizes)
    assert len(expected.unreadable) >= 4 - ("0000" in str(source))
    same(ours, expected)
    same(again, expected)


def test_what_is_written_to_a_cached_set_stays_in_this_process(tmp_path, cached):
    source = folder(tmp_path / "set")
    first = data.load(source)
    first.images[0] = 0
    assert first.images[0].sum() == 0 < data.load(source).images[0].sum()


@pytest.mark.parametrize("change", ["content", "touched", "removed", "added"])
def test_changed_sources_are_read_again(tmp_path, monkeypatch, cached, change):
    source = folder(tmp_path / "set")
    data.load(source)
    before, path = built(cached), source / "0" / "000.png"
    if change == "content":
        path.write_bytes(encoded(999))
    elif change == "touched":
        os.utime(path, (1, 1))
    elif change == "removed":
        path.unlink()
    else:
        (source / "0" / "999.png").write_bytes(encoded(999))
    ours = data.load(source)
    assert built(cached) != before and len(list(cached.iterdir())) == 1  # the old one is gone
    monkeypatch.setattr(cache, "LARGE", 1 << 30)
    same(ours, data.load(source))


LOAD = """
import sys
from ptglab.data import cache
from ptglab import data
from ptglab.data import decode
from ptglab.data import sources
cache.LARGE, sources.BLOCK = 0, 20
print(data.load(sys.argv[1]).fingerprint)
"""
HERE = os.path.dirname(os.path.dirname(os.path.dirname(cache.__file__)))
HOLD = """
import sys, time
from pathlib import Path
from ptglab import files
lock = files.lock(Path(sys.argv[1]), "process")
print(1, flush=True)
time.sleep(2)
"""


@pytest.mark.parametrize("stage", ["headers", "pixels_done"])
def test_a_build_that_is_killed_goes_on_where_it_was(tmp_path, cached, monkeypatch, stage):
    source = folder(tmp_path / "set", 600)
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(  # the processes that decode are slowed down, or the kill comes too late
        "import sys, time\n"
        "if sys.argv[0] == '-m':\n"
        "    from PIL import Image\n"
        "    opened = Image.open\n"
        "    Image.open = lambda *a, **k: (time.sleep(0.01), opened(*a, **k))[1]\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": f"{slow}{os.pathsep}{HERE}"}
    command = [sys.executable, "-c", LOAD, str(source)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(cached.glob(f"*/{stage}/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    marks = {path: path.stat().st_mtime_ns for path in cached.glob(f"*/{stage}/*.json")}
    assert 3 <= len(marks) < 30 and not list(cached.glob("*/done.json"))
    kept, work = [], cache._work

    def watched(*rest):
        work(*rest)
        kept.extend(path.stat().st_mtime_ns == when for path, when in marks.items() if path.exists())

    monkeypatch.setattr(cache, "_work", watched)
    ours = data.load(source)
    assert len(kept) >= len(marks) and all(kept)
    monkeypatch.setattr(cache, "LARGE", 1 << 30)
    same(ours, data.load(source))


def test_a_build_killed_while_pixels_were_moved_begins_anew(tmp_path, cached, monkeypatch):
    source = folder(tmp_path / "set")
    pack = cache._pack

    def killed(*rest):
        pack(*rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_pack", killed)
    with pytest.raises(KeyboardInterrupt):
        data.load(source)
    monkeypatch.setattr(cache, "_pack", pack)
    ours = data.load(source)
    monkeypatch.setattr(cache, "LARGE", 1 << 30)
    same(ours, data.load(source))


def test_a_process_that_fails_is_told_in_one_line(tmp_path, cached, monkeypatch):
    source = folder(tmp_path / "set")
    monkeypatch.setattr(cache, "KINDS", {"nothing": sources.Shards, "files": sources.Files})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(sources.Files, "blocks", lambda self: [[0, 20, [0, 20]], [20, 20, ["x"]]])
    refused("a process that decodes images has failed", "TypeError", "run again", "PTGLAB_CACHE", call=data.load)(
        source
    )


def test_no_room_and_no_image_are_told(tmp_path, cached, monkeypatch):
    source = folder(tmp_path / "set")
    monkeypatch.setattr(cache.files, "allocate", lambda *rest: (_ for _ in ()).throw(OSError(28, "full")))
    refused("do not fit into", "make room", "PTGLAB_CACHE", call=data.load)(source)
    for path in (tmp_path / "set").rglob("*.png"):
        path.write_bytes(b"no image")
    monkeypatch.setattr(cache, "is_large", lambda *rest: True)
    refused("none of the 130 images can be read", "not an image", call=data.load)(source)


@pytest.mark.parametrize(("limit", "expected"), [(130 * 8 * 8 * 3, False), (130 * 8 * 8 * 3 - 1, True)])
def test_a_set_is_large_by_the_pixels_it_will_have(tmp_path, monkeypatch, limit, expected):
    files = sources.Files(sorted(map(str, folder(tmp_path / "set").rglob("*.png"))))
    monkeypatch.setattr(cache, "LARGE", limit)
    assert cache.is_large(files, None, None) == expected
    assert not cache.is_large(files, 4, None)
    assert not cache.is_large(sources.Files(files.paths[:99]), 4096, None)


def test_where_caches_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("PTGLAB_CACHE", str(tmp_path))
    places = {cache.folder("a/set", split, None, size, None) for split in ("train", "test") for size in (None, 8)}
    assert len(places) == 4 and all(p.parent == tmp_path and p.name.startswith("set-") for p in places)
    monkeypatch.delenv("PTGLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache.root()) == "/x/ptglab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert str(cache.root()) == "/h/.cache/ptglab"


def test_a_cache_that_another_process_builds_is_waited_for(tmp_path, cached, capsys):
    source = folder(tmp_path / "set")
    place = cache.folder(source, "train", None, None, None)
    place.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(place)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": HERE})
    holder.stdout.readline()
    assert len(data.load(source)) == 126
    assert "waiting for its cache" in capsys.readouterr().err
    holder.stdout.close()
    holder.wait()
