"""The cache of pixels against decoding in memory: the same set, built once, gone on with after a kill, never stale."""

import contextlib
import errno
import io
import multiprocessing
import os
import signal
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from expected import refused
from PIL import Image

from ptglab import data, files
from ptglab.data import cache, decode


def encoded(number: int, colour: bool = True) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3) if colour else (8, 8)).astype(np.uint8)
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


def parquet(path, n: int = 130):
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
    """Every set is large, blocks are small."""
    monkeypatch.setenv("PTGLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LARGE", 0)
    return tmp_path / "cache"


@pytest.fixture
def in_memory(monkeypatch, tmp_path):
    """Return a function that loads a set in memory."""

    def load(source, **sizes):
        monkeypatch.setattr(cache, "LARGE", 1 << 30)
        monkeypatch.setenv("PTGLAB_CACHE", str(tmp_path / "none"))
        image_set = data.load(source, **sizes)
        assert not (tmp_path / "none").exists()
        return image_set

    return load


def same(ours: data.ImageSet, expected: data.ImageSet) -> None:
    np.testing.assert_array_equal(ours.images.numpy(), expected.images.numpy())
    np.testing.assert_array_equal(ours.labels_given, expected.labels_given)
    assert (ours.ids, ours.class_names, ours.files) == (expected.ids, expected.class_names, expected.files)
    assert list(ours.unreadable) == list(expected.unreadable) and ours.fingerprint == expected.fingerprint
    kept = [note for note in ours.notes if "pixels are kept in" in note]
    assert [note for note in ours.notes if note not in kept] == list(expected.notes) and len(kept) == 1


def built(place):
    return next(place.glob("*/plan.json")).stat().st_mtime_ns


@pytest.mark.parametrize("make", [folder, parquet])
@pytest.mark.parametrize(("sizes", "jobs"), [({}, 2), ({"image_size": 5}, 1), ({"at_most": 6}, 1)])
def test_a_cached_set_is_the_one_decoded_in_memory(tmp_path, monkeypatch, cached, in_memory, make, sizes, jobs):
    monkeypatch.setattr(torch, "get_num_threads", lambda: jobs)
    monkeypatch.setattr(cache, "MANY", 0)
    source = make(tmp_path / "set")
    ours = data.load(source, **sizes)
    before = built(cached)
    monkeypatch.setattr(cache, "_in_parallel", None)  # nothing is decoded again
    again = data.load(source, **sizes)
    assert built(cached) == before
    monkeypatch.undo()
    expected = in_memory(source, **sizes)
    assert len(expected.unreadable) >= 4
    same(ours, expected)
    same(again, expected)


def test_what_is_written_to_a_cached_set_stays_in_this_process(tmp_path, cached):
    source = folder(tmp_path / "set")
    first = data.load(source)
    first.images[0] = 0
    assert first.images[0].sum() == 0 < data.load(source).images[0].sum()


@pytest.mark.parametrize("change", ["content", "touched", "removed", "added"])
def test_changed_sources_are_read_again(tmp_path, cached, in_memory, change):
    source = folder(tmp_path / "set")
    data.load(source)
    before, path = built(cached), source / "0" / "000.png"
    if change == "content":
        path.write_bytes(encoded(999) + b"end")
    elif change == "touched":
        os.utime(path, (1, 1))
    elif change == "removed":
        path.unlink()
    else:
        (source / "0" / "999.png").write_bytes(encoded(999))
    ours = data.load(source)
    assert built(cached) != before and len(list(cached.iterdir())) == 1  # the old one is gone
    same(ours, in_memory(source))


def killed(source, place, at: str) -> None:
    """Build a cache in this process, which is killed when it is about to call `decode.put` or to write the plan."""
    os.environ["PTGLAB_CACHE"], cache.LARGE = str(place), 0
    module, name = (decode, "put") if at == "pixels" else (files, "write_json")
    setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    torch.set_num_threads(1)
    data.load(source)


@pytest.mark.parametrize("at", ["pixels", "plan"])
def test_a_build_that_is_killed_begins_anew(tmp_path, cached, in_memory, at):
    source = folder(tmp_path / "set")
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(source, cached, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(cached.glob("*/pixels.npy")) and not list(cached.glob("*/plan.json"))
    same(data.load(source), in_memory(source))


def test_a_process_that_dies_is_reported_in_one_line(tmp_path, cached, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cache, "MANY", 0)
    parts = [cache.Block(1, partial(os._exit, 3)), cache.Block(1, partial(iter, ["a.png"]))]
    refused("a process that decodes images has died", "run again", call=cache.images)(parts, ["a", "b"], [], cached)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_no_room_and_no_image_are_refused(tmp_path, cached, monkeypatch, number):
    def full(*rest):
        raise OSError(number, "full")

    source = folder(tmp_path / "set")
    monkeypatch.setattr(files, "allocate", full)
    refused("do not fit into", "smaller image_size", "PTGLAB_CACHE")(source)
    monkeypatch.undo()
    monkeypatch.setenv("PTGLAB_CACHE", str(cached))
    for path in (tmp_path / "set").rglob("*.png"):
        path.write_bytes(b"no image")
    refused("none of the 130 images can be read", "not an image")(source)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, cached):
    cached.write_text("a file")
    refused(str(cached), "a file stands where a folder should", "PTGLAB_CACHE")(folder(tmp_path / "set"))


@pytest.mark.parametrize("free", [1e12, 1000])
@pytest.mark.parametrize("image_size", [None, 4])
def test_a_set_is_large_by_the_pixels_it_will_have_or_for_want_of_memory(
    tmp_path, cached, monkeypatch, free, image_size
):
    source, size = folder(tmp_path / "set"), 128 * 3 * (64 if image_size is None else 16)
    monkeypatch.setattr(decode, "free_memory", lambda: free)
    for limit in (size, size - 1):
        monkeypatch.setattr(cache, "LARGE", limit)
        kept = any("pixels are kept" in note for note in data.load(source, image_size=image_size).notes)
        assert kept == (limit < size or free < size)


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


def test_a_cache_that_another_process_builds_is_waited_for(tmp_path, cached, monkeypatch, capsys):
    """The other lets go of the lock when this one has said that it waits."""
    source = folder(tmp_path / "set")
    place = cache.folder(source, "train", None, None, None)
    place.mkdir(parents=True)
    held, lock = contextlib.ExitStack(), files.lock
    held.enter_context(lock(place, "process"))

    def waited(folder, what, patience=0.0):
        if patience:
            assert "waiting for its cache" in capsys.readouterr().err
            held.close()
        return lock(folder, what, patience)

    monkeypatch.setattr(files, "lock", waited)
    assert len(data.load(source)) == 126
