"""Decoding against a slow per-image Pillow reference, and files that cannot be read."""

import io
import statistics
import struct
import threading
import time
import warnings

import numpy as np
import pytest
from bad_inputs import png
from PIL import Image, PngImagePlugin

from ptglab.data import decode as module
from ptglab.data.decode import decode
from ptglab.errors import InputError


def decode_files(paths, image_size=None, at_most=None):
    return decode(paths, [path.name for path in paths], lambda path: path, image_size, at_most)


def noise_image(mode, size, seed=0):
    """An image of random pixels; size is (width, height)."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands)[: 2 + (bands > 1)]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).convert(mode)


def saved(folder, images, suffix=".png"):
    paths = []
    for i, image in enumerate(images):
        paths.append(folder / f"{i:03d}{suffix}")
        image.save(paths[-1])
    return paths


def slow_reference(paths, mode, side=None):
    """One image after the other, as one would by hand."""
    stack = []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert(mode)
            if side is not None and image.size != (side, side):
                image = image.resize((side, side), Image.BICUBIC)
            array = np.array(image)
        stack.append(array[None] if mode == "L" else np.stack([array[:, :, c] for c in range(3)]))
    return np.stack(stack)


@pytest.mark.parametrize(
    "sizes",
    [
        [(40, 60), (50, 50), (64, 48)],
        [(40, 41), (44, 48)],
        [(8, 10), (12, 9)],
        [(300, 200), (400, 310), (250, 260)],
    ],
    ids=["median", "even count", "at least 32", "at most 224"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_mixed_sizes_become_a_square_of_the_median_side(tmp_path, sizes, mode):
    paths = saved(tmp_path, [noise_image(mode, size, i) for i, size in enumerate(sizes)])
    side = int(min(224, max(32, statistics.median([s for size in sizes for s in size]))))
    images, kept, unreadable, notes = decode_files(paths)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, mode, side))
    assert (kept, unreadable) == (list(range(len(sizes))), [])
    assert notes == [f"images of {len(sizes)} sizes, all resized to {side} x {side}"]


@pytest.mark.parametrize("size", [(9, 5), (130, 120)], ids=["one thread", "many threads"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_one_size_keep_every_pixel(tmp_path, size, mode):
    paths = saved(tmp_path, [noise_image(mode, size, i) for i in range(3)])
    images, _, _, notes = decode_files(paths)
    assert images.shape == (3, len(mode), size[1], size[0])
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, mode))
    assert notes == []


def test_images_larger_than_at_most_become_that_square(tmp_path):
    paths = saved(tmp_path, [noise_image("RGB", (60, 40), i) for i in range(2)])
    images, _, _, notes = decode_files(paths, at_most=32)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, "RGB", 32))
    assert notes == ["images of 60 x 40 pixels, resized to 32 x 32"]
    assert decode_files(paths, at_most=60)[0].shape[2:] == (40, 60)
    paths = saved(tmp_path, [noise_image("RGB", size) for size in [(90, 80), (70, 70)]])
    assert decode_files(paths, at_most=32)[0].shape[2:] == (32, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_s_note_which_side_is_up_is_followed(tmp_path, orientation):
    upright = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "1.png", exif=exif)
    images, _, unreadable, notes = decode_files([tmp_path / "1.png"])
    np.testing.assert_array_equal(images[0, 0].numpy(), np.asarray(upright))
    assert (unreadable, notes) == ([], [])


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "jpg"])
def test_images_that_lie_count_as_upright(tmp_path, kind):
    """So that those of one size, once upright, keep it."""
    exif = Image.Exif()
    exif[274] = 6
    for i in range(2):
        Image.new("RGB", (20, 8)).save(tmp_path / f"{i}.{kind}", exif=exif)
    images, _, unreadable, notes = decode_files([tmp_path / f"{i}.{kind}" for i in range(2)])
    assert images.shape == (2, 3, 20, 8) and (unreadable, notes) == ([], [])


def test_deep_grey_that_lies_is_turned(tmp_path):
    deep, exif = np.arange(12, dtype=np.uint16).reshape(3, 4) * 4096, Image.Exif()
    exif[274] = 8
    Image.fromarray(deep).save(tmp_path / "1.png", exif=exif)
    np.testing.assert_array_equal(decode_files([tmp_path / "1.png"])[0][0, 0].numpy(), np.rot90(deep // 256))


@pytest.mark.parametrize("note", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(99)), bytes(500)])
@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_a_damaged_note_is_no_damaged_image(tmp_path, kind, note):
    image = noise_image("RGB", (16, 16))
    image.save(tmp_path / f"1.{kind}", exif=note, lossless=True)
    images, _, unreadable, _ = decode_files([tmp_path / f"1.{kind}"])
    assert unreadable == [] and images.shape == (1, 3, 16, 16)


def test_image_size_is_not_noted_because_it_was_asked_for(tmp_path):
    paths = saved(tmp_path, [noise_image("RGB", size) for size in [(20, 30), (40, 40)]])
    images, _, _, notes = decode_files(paths, image_size=24)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, "RGB", 24))
    assert notes == []


def test_grey_among_colour_is_converted_and_noted(tmp_path):
    paths = saved(tmp_path, [noise_image(mode, (8, 8), i) for i, mode in enumerate(["L", "RGB", "1"])])
    images, _, _, notes = decode_files(paths)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, "RGB"))
    assert notes == ["2 grey images converted to colour"]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_and_noted(tmp_path, mode):
    paths = saved(tmp_path, [noise_image(mode, (8, 8))])
    images, _, _, notes = decode_files(paths)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, {"RGBA": "RGB", "LA": "L"}[mode]))
    assert notes == ["1 images with an alpha channel, which was dropped"]


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (6, 7), np.uint16)
    paths = saved(tmp_path, [Image.fromarray(deep)])
    images = decode_files(paths)[0]
    np.testing.assert_array_equal(images[0, 0].numpy(), deep // 256)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<f4"])
def test_deep_tiffs(tmp_path, dtype):
    """Whole numbers keep the upper eight of sixteen bits; fractions up to 1 are spread, others cut to 0 to 255."""
    deep = np.array([[0, 255, 256, 40000, 65535]], dtype)
    Image.fromarray(deep).save(tmp_path / "1.tif")
    expected = [0, 255, 255, 255, 255] if dtype == "<f4" else [0, 0, 1, 156, 255]
    assert decode_files([tmp_path / "1.tif"])[0].flatten().tolist() == expected


@pytest.mark.parametrize(
    "fractions, expected",
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([-1, 0.5, 1], [0, 128, 255]),
        ([np.nan, 0.2, np.inf], [0, 51, 255]),
        ([-np.inf, 1.5, 300], [0, 2, 255]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
    ],
)
def test_fractions(tmp_path, fractions, expected):
    Image.fromarray(np.array([fractions], np.float32)).save(tmp_path / "1.tif")
    assert decode_files([tmp_path / "1.tif"])[0].flatten().tolist() == expected


def palette_image():
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    expected = np.stack([indices, 255 - indices, np.full_like(indices, 7)])
    return image, expected


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(64))], ids=["opaque", "one index", "an alpha a colour"])
def test_a_palette_becomes_its_colours(tmp_path, transparency):
    image, expected = palette_image()
    image.save(tmp_path / "p.png", **({} if transparency is None else {"transparency": transparency}))
    images, _, unreadable, notes = decode_files([tmp_path / "p.png"])
    np.testing.assert_array_equal(images[0].numpy(), expected)
    assert unreadable == []
    assert len(notes) == (transparency is not None)


def test_of_an_animation_the_first_frame(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    images = decode_files([tmp_path / "a.gif"])[0]
    assert images.flatten(2).unique(dim=2).flatten().tolist() == [255, 0, 0]


def test_a_cmyk_jpeg_becomes_colour(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    images = decode_files([tmp_path / "red.jpg"])[0]
    assert images.shape == (1, 3, 16, 16)
    assert abs(images[0].float().mean((1, 2)).numpy() - [255, 0, 0]).max() <= 3


def broken_files(folder):
    """Six files, of which 1, 2, 3 and 5 are damaged, and a word of the reason for each of these."""
    paths = saved(folder, [noise_image("RGB", (64, 64), i) for i in range(6)], ".jpg")
    paths[1].write_bytes(paths[1].read_bytes()[:1500])
    paths[2].write_bytes(b"")
    paths[3] = folder / "003.png"
    paths[3].write_text("this is a text")
    paths[5] = folder / "missing.png"
    return paths, {"001.jpg": "truncated", "002.jpg": "not an image", "003.png": "not an image", "missing.png": "such"}


@pytest.mark.parametrize("in_memory", [1 << 30, 0], ids=["in memory", "memory-mapped"])
def test_what_cannot_be_read_is_listed_and_the_others_keep_their_order(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(module, "IN_MEMORY", in_memory)
    allocated, allocate = [], module.allocate
    monkeypatch.setattr(module, "allocate", lambda shape: allocated.append(allocate(shape)) or allocated[-1])
    paths, reasons = broken_files(tmp_path)
    images, kept, unreadable, _ = decode_files(paths)
    assert kept == [0, 4]
    np.testing.assert_array_equal(images.numpy(), slow_reference([paths[0], paths[4]], "RGB"))
    assert [name for name, _ in unreadable] == list(reasons)
    assert all(reasons[name] in reason for name, reason in unreadable)
    assert isinstance(allocated[0], np.memmap) == (in_memory == 0)
    assert np.shares_memory(allocated[0], images.numpy())  # a copy of what is memory-mapped might not fit


def test_order_holds_over_many_blocks(tmp_path):
    n = 2 * module.BLOCK + 5
    paths = saved(tmp_path, [Image.new("L", (4, 4), i) for i in range(n)], ".bmp")
    for i in (0, module.BLOCK, n - 1):
        paths[i].write_bytes(b"BM")
    images, kept, unreadable, _ = decode_files(paths)
    assert images[:, 0, 0, 0].tolist() == kept == [i for i in range(n) if i not in (0, module.BLOCK, n - 1)]
    assert len(unreadable) == 3


def test_an_image_of_too_many_pixels_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 99)
    paths = saved(tmp_path, [noise_image("L", size) for size in [(9, 11), (10, 10)]])
    _, kept, unreadable, _ = decode_files(paths)
    assert kept == [0]
    assert unreadable == [("001.png", "10 x 10 pixels are more than 99")]


def test_what_pillow_calls_a_bomb_is_listed(tmp_path, monkeypatch):
    paths = saved(tmp_path, [noise_image("L", size) for size in [(4, 4), (30, 30)]])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    _, kept, unreadable, _ = decode_files(paths)
    assert kept == [0]
    assert [name for name, _ in unreadable] == ["001.png"] and "900 pixels" in unreadable[0][1]


def test_what_pillow_warns_of_is_no_noise(tmp_path, monkeypatch):
    paths = saved(tmp_path, [noise_image("L", (30, 30))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(Image.DecompressionBombWarning):  # it would
        Image.open(paths[0])
    before = list(warnings.filters)
    assert decode_files(paths)[1] == [0]
    assert warnings.filters == before


def test_libtiff_keeps_quiet(tmp_path, capfd):
    noise_image("1", (24, 24)).save(tmp_path / "1.tif", compression="group4")
    content = bytearray((tmp_path / "1.tif").read_bytes())
    content[10:30] = bytes(20)
    (tmp_path / "1.tif").write_bytes(content)
    decode_files([*saved(tmp_path, [noise_image("L", (24, 24))]), tmp_path / "1.tif"])
    assert capfd.readouterr() == ("", "")


def test_an_image_with_a_side_too_long_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SIDE", 20)
    paths = saved(tmp_path, [noise_image("L", size) for size in [(20, 2), (2, 21)]])
    _, kept, unreadable, _ = decode_files(paths)
    assert (kept, unreadable) == ([0], [("001.png", "2 x 21 pixels: a side is longer than 20")])


@pytest.mark.parametrize("large, together", [(0, False), (1 << 40, True)])
def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch, large, together):
    monkeypatch.setattr(module, "LARGE_PIXELS", large)
    monkeypatch.setattr(module, "BLOCK", 1)
    monkeypatch.setattr(module, "SMALL_PIXELS", 0)
    running, most, lock, pixels = [], [], threading.Lock(), module._pixels

    def watched(*args):
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.1)
        with lock:
            running.pop()
        return pixels(*args)

    monkeypatch.setattr(module, "_pixels", watched)
    assert len(decode_files(saved(tmp_path, [noise_image("L", (4, 4))] * 4))[1]) == 4
    assert (max(most) > 1) == together


def test_every_image_is_decoded_once(tmp_path, monkeypatch):
    """Pillow decodes a whole PNG image when it is asked for the camera's notes."""
    calls, prepare = [], PngImagePlugin.PngImageFile.load_prepare
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda self: calls.append(prepare(self)))
    decode_files(saved(tmp_path, [noise_image("RGB", (8, 8), i) for i in range(5)]))
    assert len(calls) == 5


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("content", [PROGRAM, b"\n".join([b"! XPM2", b"1 1 1 1", b"a c #000", b"a"]), b"SIMPLE  ="])
def test_only_formats_of_photographs_are_opened(tmp_path, content):
    """An EPS file is a program, which Pillow gives to Ghostscript."""
    paths = saved(tmp_path, [noise_image("L", (4, 4))])
    (tmp_path / "x.png").write_bytes(content)
    assert decode_files([*paths, tmp_path / "x.png"])[2] == [("x.png", "not an image")]


@pytest.mark.parametrize("stage", ["header", "pixels"])
@pytest.mark.parametrize(
    "error, said",
    [
        (FileNotFoundError(2, "No such file or directory", "/a/path.png"), "No such file or directory"),
        (OSError("image file is truncated"), "image file is truncated"),
        (ValueError("two\nlines \x1b[31m \udcff"), r"two lines \x1b[31m \udcff"),
        (KeyError(), "KeyError"),
        (MemoryError(), "MemoryError"),
        (SyntaxError("x" * 5000), "x" * 200),
    ],
)
def test_a_reason_is_one_short_line(tmp_path, monkeypatch, stage, error, said):
    paths = saved(tmp_path, [noise_image("L", (4, 4)) for _ in range(2)])

    prepare = PngImagePlugin.PngImageFile.load_prepare

    def fail(image):
        if image.filename.endswith("001.png"):
            raise error
        return prepare(image) if stage == "pixels" else 1

    if stage == "header":
        monkeypatch.setattr(module, "_orientation", fail)
    else:
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    unreadable = decode_files(paths)[2]
    assert unreadable == [("001.png", said if stage == "header" else f"cannot be decoded: {said}")]


@pytest.mark.parametrize("damage", ["header", "pixels"])
def test_nothing_readable_is_refused(tmp_path, damage):
    paths = saved(tmp_path, [noise_image("RGB", (64, 64), i) for i in range(2)], ".jpg")
    for path in paths:
        path.write_bytes(path.read_bytes()[: 10 if damage == "header" else 1500])
    with pytest.raises(InputError, match=r"^none of the 2 images can be read, the first: '000.jpg' \(.+\)$"):
        decode_files(paths)


def icon(inner: bytes) -> bytes:
    """Return a Windows icon that says it has 16 x 16 pixels, and holds the PNG file `inner`."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def test_an_icon_cannot_hide_a_larger_image(tmp_path):
    (tmp_path / "a.png").write_bytes(icon(png(70_000, 1)))
    (tmp_path / "b.png").write_bytes(icon(png(16, 16)))
    images, kept, unreadable, _ = decode_files([tmp_path / "a.png", tmp_path / "b.png"])
    assert len(images) == 1 and kept == [1]
    [(id, reason)] = unreadable
    assert id == "a.png" and "70000 x 1 pixels: a side is longer" in reason


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_file_too_large_is_not_opened(tmp_path, monkeypatch, as_bytes):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    contents = [png(8, 8), png(8, 8) + bytes(2000)]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    sources = (contents, ["a.png", "b.png"], io.BytesIO) if as_bytes else (paths, ["a.png", "b.png"], lambda path: path)
    _, kept, unreadable, _ = module.decode(*sources, None)
    assert kept == [0] and unreadable == [("b.png", f"{len(contents[1]):,} bytes are more than 1,000")]


@pytest.mark.parametrize(
    ("maximum", "current", "free"), [("max", "5", 4096), ("3000", "1000", 2000), ("9999999", "0", 4096)]
)
def test_free_memory_is_the_machines_or_the_control_groups(tmp_path, monkeypatch, maximum, current, free):
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  4 kB\n")
    (tmp_path / "memory.max").write_text(f"{maximum}\n")
    (tmp_path / "memory.current").write_text(f"{current}\n")
    monkeypatch.setattr(module, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(module, "GROUP", tmp_path)
    assert module.free_memory() == free
    monkeypatch.setattr(module, "MEMORY", tmp_path / "none")
    monkeypatch.setattr(module, "GROUP", tmp_path / "none")
    assert module.free_memory() == float("inf")
