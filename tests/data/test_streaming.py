"""`ImageSet.batches`: the original files at a network's own size, against timm's transform, a batch at a time."""

import io
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from expected import refused
from PIL import Image
from timm.data import create_transform

from ptglab import data
from ptglab.data import cache, decode


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth picture with edges; size is (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    coarse.paste(tuple(rng.integers(0, 256, 3).tolist()), (size[0] // 3, size[1] // 4, size[0] // 2, size[1] // 2))
    return coarse


SIZES = [(97, 64), (64, 97), (120, 120), (35, 300), (48, 50), (250, 121), (61, 33)]


def folder(path, kind="png", n=14) -> Path:
    for i in range(n):
        (path / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        photo(i, SIZES[i % 7]).save(path / f"{i % 2}" / f"{i:02d}.{kind}")
    return path


def parquet(path, n=14) -> Path:
    """Row groups of 3; every fifth label is missing, image 6 is none."""
    files = []
    for i in range(n):
        photo(i, SIZES[i % 7]).save(file := io.BytesIO(), "PNG")
        files.append({"bytes": b"" if i == 6 else file.getvalue(), "path": f"{i}"})
    labels = pa.array([None if i % 5 == 4 else i % 2 for i in range(n)])
    path.mkdir()
    pq.write_table(pa.table({"image": files, "label": labels}), path / "train.parquet", row_group_size=3)
    return path


def by_timm(pictures, size, crop=1.0, interpolation="bicubic") -> np.ndarray:
    """One picture after the other, as timm's models are evaluated."""
    options = {"crop_pct": crop, "interpolation": interpolation, "use_prefetcher": True}
    transform = create_transform(size, is_training=False, **options)
    return np.stack([np.asarray(transform(picture.convert("RGB"))) for picture in pictures]).astype(int)


def streamed(image_set, size, *rest, **options) -> np.ndarray:
    batches = list(image_set.batches(size, *rest, **options))
    assert all(batch.dtype == torch.uint8 for batch in batches)
    return torch.cat(batches).numpy().astype(int)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "crop"), [(32, 1.0), (32, 0.875), (48, 0.95), (70, 0.9)])
def test_a_file_is_seen_as_by_timm(tmp_path, size, crop, interpolation):
    """It is cut out and resized in one step, so that some pixels are rounded the other way."""
    image_set = data.load(folder(tmp_path / "set"), image_size=8)
    expected = by_timm((Image.open(file) for file in image_set.files), size, crop, interpolation)
    difference = abs(streamed(image_set, size, crop, interpolation) - expected)
    assert difference.max() <= 3 and (difference > 1).mean() < 1e-4 and difference.mean() < 0.05


def test_a_large_jpeg_is_decoded_smaller(tmp_path):
    """That changes little, here the sharp edges."""
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, path in enumerate(paths):
        photo(i, [(501, 333), (333, 501), (803, 640), (1200, 401)][i]).save(path, quality=95)
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(4)))
    difference = streamed(data.load(tmp_path), 48, 0.875) - by_timm(map(Image.open, paths), 48, 0.875)
    assert 0 < abs(difference).mean() < 1 and abs(difference.mean((2, 3))).max() < 0.5


def test_rows_of_parquet_and_of_a_subset_keep_their_order(tmp_path):
    image_set = data.load(parquet(tmp_path / "set"))
    assert [int(id) for id in image_set.ids] == [0, 1, 2, 3, 5, 7, 8, 10, 11, 12, 13]
    for chosen in (image_set, image_set.subset(4, seed=1), image_set.subset(6, seed=2).subset(2, seed=0)):
        rows = [int(id) for id in chosen.ids]
        expected = by_timm((photo(i, SIZES[i % 7]) for i in rows), 24)
        batches = [batch.numpy() for batch in chosen.batches(24, batch_size=3)]
        assert [len(batch) for batch in batches] == [3] * (len(rows) // 3) + [len(rows) % 3] * (len(rows) % 3 > 0)
        assert abs(np.concatenate(batches) - expected).max() <= 1


def test_a_subset_opens_only_its_blocks():
    """A block without a chosen image is not read; of the others only what is chosen comes."""
    opened = []
    parts = [cache.Block(4, lambda i=i: opened.append(i) or iter(range(4 * i, 4 * i + 4))) for i in range(5)]
    assert list(cache.Originals(parts, np.array([1, 2, 9, 16, 19])).read()) == [1, 2, 9, 16, 19]
    assert opened == [0, 2, 4]


def test_sets_without_files_are_enlarged(tmp_path):
    digits = data.load("digits").subset(5, seed=0)
    pictures = [Image.fromarray(image[0].numpy()) for image in digits.images]
    np.testing.assert_array_equal(streamed(digits, 24), by_timm(pictures, 24))


def test_grey_and_turned_images(tmp_path):
    picture, exif = photo(0, (60, 41)), Image.Exif()
    exif[274] = 6
    for name in "ab":
        (tmp_path / name).mkdir()
    picture.save(tmp_path / "a" / "0.png", exif=exif)
    picture.convert("L").save(tmp_path / "b" / "1.png")
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    expected = by_timm([upright, picture.convert("L")], 30, 0.9)
    assert abs(streamed(data.load(tmp_path), 30, 0.9) - expected).max() <= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_few_batches_are_decoded_ahead(tmp_path, monkeypatch, threads):
    image_set, begun, put = data.load(folder(tmp_path / "set", n=20)), [], decode.put
    monkeypatch.setattr(decode, "put", lambda *rest: begun.append(rest) or put(*rest))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batches = image_set.batches(8, batch_size=2)
    assert not begun
    for i in range(1, 4):
        next(batches)
        assert 2 * i <= len(begun) < 2 * (i + cache.AHEAD + threads)
    batches.close()
    assert len(begun) < 2 * (3 + cache.AHEAD + threads) <= len(image_set)


@pytest.mark.parametrize("change", ["text", "cut", "gone"])
def test_a_file_that_has_changed_is_named(tmp_path, change):
    image_set = data.load(folder(tmp_path / "set"))
    path = Path(image_set.files[5])
    path.write_bytes({"text": b"text", "cut": path.read_bytes()[:200], "gone": b""}[change])
    if change == "gone":
        path.unlink()
    batches = image_set.batches(8, batch_size=4)
    assert len(next(batches)) == 4
    refused(image_set.ids[5], "has changed", call=list)(batches)


def test_a_parquet_file_that_has_changed_is_named(tmp_path):
    image_set = data.load(parquet(tmp_path / "set"))
    pq.write_table(pq.read_table(tmp_path / "set" / "train.parquet")[:13], tmp_path / "set" / "train.parquet",
                   row_group_size=3)  # fmt: skip
    refused("'13'", "has changed", call=list)(image_set.batches(8))
    (tmp_path / "set" / "train.parquet").write_bytes(b"no parquet")
    refused("train.parquet", "no readable parquet file", call=list)(image_set.batches(8))


def test_an_interpolation_that_there_is_not_is_refused():
    refused("interpolation", "cubic", call=list)(data.load("digits").batches(8, interpolation="cubic"))


@pytest.mark.parametrize("kind", ["twelve bits", "transparent"])
def test_pixels_of_other_kinds_are_streamed_as_they_are_loaded(tmp_path, kind):
    """One scale for the set, white behind what is transparent."""
    for i in range(4):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 1 << (12 - i), (20, 20)).astype(np.uint16)
        image = Image.fromarray(pixels)
        if kind == "transparent":
            image = Image.fromarray(pixels.astype(np.uint8))
            image.putalpha(Image.fromarray((pixels % 3 * 127).astype(np.uint8)))
        image.save(tmp_path / "ab"[i % 2] / f"{i}.png")
    image_set = data.load(tmp_path)
    for chosen in (image_set, image_set.subset(2, seed=0)):
        np.testing.assert_array_equal(streamed(chosen, 20), chosen.images.expand(-1, 3, -1, -1))


def test_a_warning_of_who_reads_a_stream_is_heard():
    for _ in data.load("digits").subset(3, seed=0).batches(8):
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)


def test_blank_rows():
    digits = data.load("digits")
    assert not digits.blank.any() and digits.blank.shape == (len(digits),)
    digits.images[7] = 9
    assert np.flatnonzero(digits.blank).tolist() == [7]
