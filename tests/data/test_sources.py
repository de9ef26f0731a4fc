"""Blocks of files and of parquet rows: each image once, in order, whatever its row group."""

import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ptglab.data import sources


def shard(path, images: list[bytes], rows: int) -> str:
    """Write a parquet file of row groups of `rows` rows."""
    table = pa.table({"image": [{"bytes": image, "path": None} for image in images]})
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


@pytest.mark.parametrize("block", [1, 3, 5, 100])
def test_blocks_of_shards_hold_every_row_once(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    images = [b"%d" % i for i in range(23)]
    paths = [shard(tmp_path / "a.parquet", images[:10], 3), shard(tmp_path / "b.parquet", images[10:], 50)]
    shards = sources.Shards(paths)
    blocks = shards.blocks()
    read = [[image.getvalue() for image in shards.read(part)] for _, _, part in blocks]
    assert [len(part) for part in read] == [rows for _, rows, _ in blocks]
    assert [first for first, _, _ in blocks] == [sum(map(len, read[:i])) for i in range(len(read))]
    assert sum(read, []) == images
    assert all(rows <= max(block, 13 if first == 10 else 3) for first, rows, _ in blocks)
    assert [image.getvalue() for image in shards.sample()] == images[:3]  # of the first row group
    assert len(shards) == 23 and shards.bytes() == sum(map(os.path.getsize, paths))


@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_of_files_hold_every_path_once(monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    files = sources.Files([f"{i}.png" for i in range(7)])
    assert [path for _, _, part in files.blocks() for path in files.read(part)] == files.paths
    assert sum(rows for _, rows, _ in files.blocks()) == len(files) == 7


def test_the_state_changes_with_any_file_and_with_the_rows_that_count(tmp_path):
    path = shard(tmp_path / "a.parquet", [b"x"], 1)
    state = list(sources.Shards([path]).state())
    assert list(sources.Shards([path]).state()) == state != list(sources.Shards([path], [0]).state())
    os.utime(path, (1, 1))
    assert list(sources.Shards([path]).state()) != state
    assert list(sources.Files([path, "nowhere.png"]).state())[1] == "nowhere.png\x002"
    assert io.BytesIO(b"x").getvalue() == next(sources.Shards([path]).read([0, [0]])).getvalue()
