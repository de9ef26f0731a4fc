"""Where images come from, block by block: files, or the rows of parquet files; described by texts and numbers alone."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptglab.data import parquet

SAMPLE = 64  # images that are looked at to know what the others are like
BLOCK = 4096  # images that are read one after the other


@dataclass(frozen=True)
class Files:
    """Image files, one an image: `paths`, N of them."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def sample(self) -> list:
        """Return some images, as `decode.header` opens them."""
        return list(self.paths[:: max(1, len(self) // SAMPLE)])

    def bytes(self) -> int:
        """Return the bytes that would be in memory at once: none, each file is opened alone."""
        return 0

    def state(self) -> Iterator[str]:
        """Yield what changes when an image does."""
        for path in self.paths:
            try:
                status = os.stat(path)
                yield f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
            except OSError as error:  # it has vanished since it was listed: it will be listed as unreadable
                yield f"{path}\0{error.errno}"

    def blocks(self) -> list[list]:
        """Return [first row, number of rows, part to `read`] of blocks of BLOCK rows."""
        return [[i, min(BLOCK, len(self) - i), [i, i + BLOCK]] for i in range(0, len(self), BLOCK)]

    def read(self, part: list) -> Iterator:
        """Yield the images of a block, as `decode.header` opens them."""
        yield from self.paths[slice(*part)]


@dataclass(frozen=True)
class Shards:
    """Parquet files, `paths`, whose rows are images; those of `skipped` rows are not looked at."""

    paths: Sequence[str]
    skipped: Sequence[int] = ()

    def __len__(self) -> int:
        return sum(sum(parquet.row_groups(Path(path))) for path in self.paths)

    def sample(self) -> list:
        """Return some images, as `decode.header` opens them: the first ones."""
        _, images = zip(*zip(range(SAMPLE), parquet.blobs(Path(self.paths[0]), [0]), strict=False), strict=True)
        return [io.BytesIO(image) for image in images]

    def bytes(self) -> int:
        """Return the bytes that would be in memory at once: the whole files."""
        return sum(os.path.getsize(path) for path in self.paths)

    def state(self) -> Iterator[str]:
        """Yield what changes when an image does."""
        yield from Files(self.paths).state()
        yield json.dumps(list(self.skipped))

    def blocks(self) -> list[list]:
        """Return [first row, number of rows, part to `read`] of blocks: row groups, small ones together."""
        found, first = [], 0
        for number, path in enumerate(self.paths):
            begun = True  # no block spans two files
            for group, rows in enumerate(parquet.row_groups(Path(path))):
                if begun or found[-1][1] + rows > BLOCK:
                    found.append([first, 0, [number, []]])
                found[-1][1] += rows
                found[-1][2][1].append(group)
                first, begun = first + rows, False
        return found

    def read(self, part: list) -> Iterator:
        """Yield the images of a block, as `decode.header` opens them."""
        yield from map(io.BytesIO, parquet.blobs(Path(self.paths[part[0]]), part[1]))


KINDS = {"files": Files, "shards": Shards}
