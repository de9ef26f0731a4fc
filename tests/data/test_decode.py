"""Decoding against a slow per-image Pillow reference, and files that cannot be read."""

import io
import statistics
import struct
import warnings

import numpy as np
import pytest
from bad_inputs import png
from PIL import Image, ImageDraw, PngImagePlugin

from ptglab.data import cache, decode


@pytest.fixture
def decoded(tmp_path):
    """Return a function that decodes files, or their bytes: (images, kept, unreadable, notes)."""

    def load(files, image_size=None, at_most=None):
        parts, ids = cache.blocks(files), [getattr(file, "name", str(i)) for i, file in enumerate(files)]
        images, originals, *rest = cache.images(parts, ids, files, tmp_path / "cache", image_size, at_most)
        return images, originals.rows.tolist(), *rest

    return load


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
            if "A" in image.mode:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert(mode)
            if side is not None and image.size != (side, side):
                image = image.resize((side, side), Image.BICUBIC)
            array = np.array(image)
        stack.append(array[None] if mode == "L" else np.stack([array[:, :, c] for c in range(3)]))
    return np.stack(stack)


@pytest.mark.parametrize(
    "sizes",
    [[(40, 60), (50, 50), (64, 48)], [(40, 41), (44, 48)], [(8, 10), (12, 9)], [(300, 200), (400, 310), (250, 260)]],
    ids=["median", "even count", "at least 32", "at most 224"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_mixed_sizes_become_a_square_of_the_median_side(tmp_path, decoded, sizes, mode):
    paths = saved(tmp_path, [noise_image(mode, size, i) for i, size in enumerate(sizes)])
    side = int(min(224, max(32, statistics.median([s for size in sizes for s in size]))))
    images, kept, unreadable, notes = decoded(paths)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, mode, side))
    assert (kept, unreadable) == (list(range(len(sizes))), [])
    assert notes == [f"images of {len(sizes)} sizes, all resized to {side} x {side}"]


@pytest.mark.parametrize("size", [(9, 5), (130, 120)], ids=["one thread", "many threads"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_one_size_keep_every_pixel(tmp_path, decoded, size, mode):
    paths = saved(tmp_path, [noise_image(mode, size, i) for i in range(3)])
    images, _, _, notes = decoded(paths)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, mode))
    assert images.shape == (3, len(mode), size[1], size[0]) and notes == []


ASKED = [({"at_most": 32}, 32, True), ({"at_most": 60}, None, False), ({"image_size": 24}, 24, False)]


@pytest.mark.parametrize(("options", "side", "noted"), ASKED)
def test_sizes_that_are_asked_for(tmp_path, decoded, options, side, noted):
    paths = saved(tmp_path, [noise_image("RGB", (60, 40), i) for i in range(2)])
    images, _, _, notes = decoded(paths, **options)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, "RGB", side))
    assert notes == (["images of 60 x 40 pixels, resized to 32 x 32"] if noted else [])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_a_camera_s_note_which_side_is_up_is_followed(tmp_path, decoded, orientation, deep):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    upright = Image.fromarray(array.astype(np.uint16) * 256 if deep else array)
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "1.png", exif=exif)
    images, _, unreadable, notes = decoded([tmp_path / "1.png"])
    np.testing.assert_array_equal(images[0, 0].numpy(), array)
    assert unreadable == [] and len(notes) == deep


def test_a_note_that_says_more_than_which_side_is_up_may_be_damaged(tmp_path, decoded):
    """The side is read, the rest cannot be written again: Pillow fails after it has turned the image."""
    entries = struct.pack("<HHIHxx", 274, 3, 1, 6) + struct.pack("<HHII", 34665, 4, 1, 0xFFFFFF)
    note = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    noise_image("RGB", (20, 8)).save(tmp_path / "1.jpg", exif=note)
    images, _, unreadable, notes = decoded([tmp_path / "1.jpg"])
    assert images.shape == (1, 3, 20, 8) and (unreadable, notes) == ([], [])


@pytest.mark.parametrize(
    ("modes", "becomes", "note"),
    [
        (["L", "RGB", "1"], "RGB", "2 grey images converted to colour"),
        (["RGBA", "RGB"], "RGB", "1 images with an alpha channel, put on white, or on grey what is white itself"),
        (["LA"], "L", "1 images with an alpha channel, put on white, or on grey what is white itself"),
    ],
)
def test_what_is_converted_is_noted(tmp_path, decoded, modes, becomes, note):
    paths = saved(tmp_path, [noise_image(mode, (8, 8), i) for i, mode in enumerate(modes)])
    images, _, _, notes = decoded(paths)
    np.testing.assert_array_equal(images.numpy(), slow_reference(paths, becomes))
    assert notes == [note]


@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        (np.array([0, 255, 256, 40000, 65535], "<u2"), "png", [0, 0, 1, 156, 255]),
        (np.array([0, 255, 256, 40000, 65535], ">u2"), "tif", [0, 0, 1, 156, 255]),
        (np.array([0, 255, 256, 40000, 65535], "<i4"), "tif", [0, 0, 1, 156, 255]),
        (np.array([0, 15, 16, 2048, 4095], "<u2"), "png", [0, 0, 1, 128, 255]),
        (np.array([0, 3, 4, 512, 1023], ">u2"), "tif", [0, 0, 1, 128, 255]),
        (np.array([0, 7, 128, 255], "<u2"), "png", [0, 7, 128, 255]),
        (np.array([32000, 32100, 32255], "<u2"), "png", [0, 100, 255]),
        (np.array([-1000, 0, 1048, 3095], "<i4"), "tif", [0, 62, 128, 255]),
        (np.array([-1 << 20, 0, (1 << 20) - 1], "<i4"), "tif", [0, 128, 255]),
        (np.array([7, 7], "<i4"), "tif", [7, 7]),
        (np.array([0, 51, 255], "<f4"), "tif", [0, 51, 255]),
        (np.array([0, 255, 256, 65535], "<f4"), "tif", [0, 0, 1, 255]),
        (np.array([0, 1000, 4000], "<f4"), "tif", [0, 62, 250]),
        (np.array([-80, -60, -40, 0], "<f4"), "tif", [0, 64, 128, 255]),
        (np.array([-1, 0.5, 1], "<f4"), "tif", [0, 192, 255]),
        (np.array([0, 0.2, 0.6, 0.8], "<f4"), "tif", [0, 51, 153, 204]),
        (np.array([np.nan, 0.2, np.inf], "<f4"), "tif", [0, 51, 255]),
        (np.array([-np.inf, 1.5, 300], "<f4"), "tif", [0, 0, 255]),
        (np.array([np.nan, np.nan], "<f4"), "tif", [0, 0]),
        (np.array([-3e38, 0, 3e38], "<f4"), "tif", [0, 128, 255]),
    ],
)
def test_numbers_of_more_than_eight_bits(tmp_path, decoded, pixels, kind, expected):
    """Those that fill 8, 10, 12, 14 or 16 bits, or 0 to 1, keep their meaning; others are spread from least to most."""
    Image.fromarray(pixels[None]).save(tmp_path / f"1.{kind}")
    assert decoded([tmp_path / f"1.{kind}"])[0].flatten().tolist() == expected


def test_all_images_of_a_set_have_one_scale(tmp_path, decoded):
    """The darkest of twelve bits stays the darkest; whole numbers and others have each their own."""
    for i, top in enumerate([4095, 100, 2000]):
        Image.fromarray(np.array([[0, top]], np.uint16)).save(tmp_path / f"{i}.png")
        Image.fromarray(np.array([[-80, top / -100]], np.float32)).save(tmp_path / f"{i}.tif")
    noise_image("L", (2, 1)).save(tmp_path / "9.png")
    images, _, _, notes = decoded([*sorted(tmp_path.glob("*.png")), *sorted(tmp_path.glob("*.tif"))])
    eight = np.asarray(noise_image("L", (2, 1)))[0].tolist()
    assert images[:4, 0, 0].tolist() == [[0, 255], [0, 6], [0, 125], eight]
    assert images[4:, 0, 0].tolist() == [[0, 126], [0, 255], [0, 194]]
    assert [note.split(" images")[0] for note in notes] == ["3", "3"]
    assert "0 is black and 4095 white" in notes[1] and "-80 is black and -1 white" in notes[0]


def test_a_few_hot_pixels_do_not_make_everything_black(tmp_path, decoded):
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(200, 1201, (64, 64)).astype(np.uint16)
        pixels[5, 5] = 65535
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    images = decoded(sorted(tmp_path.iterdir()))[0].float()
    assert 120 < images.mean() < 136 and images.std() > 70


def spectrogram(seed: int) -> np.ndarray:
    """A smooth picture from 0 to 1, both of which occur, float64 [30, 40]."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.random((6, 8)).astype(np.float32)).resize((40, 30), Image.Resampling.BICUBIC)
    smooth = np.asarray(rough, np.float64)
    return (smooth - smooth.min()) / np.ptp(smooth)


KINDS = {
    "12 in 16 bits": lambda x: (x * 4095).round().astype(np.uint16),
    "whole, signed": lambda x: (x * 30_000 - 9000).round().astype(np.int32),
    "decibels": lambda x: (80 * x - 80).astype(np.float32),
    "0 to 4000": lambda x: (4000 * x).astype(np.float32),
    "fractions": lambda x: x.astype(np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures_of_every_kind(tmp_path, decoded, kind):
    """Their uint8 is that of eight bits within two levels, up to one affine map for all."""
    for i in range(40):
        Image.fromarray((spectrogram(i) * 255).round().astype(np.uint8)).save(tmp_path / f"{i:02}.png")
        Image.fromarray(KINDS[kind](spectrogram(i))).save(tmp_path / f"{i:02}.tif")
    ours, expected = (
        decoded(sorted(tmp_path.glob(name)))[0].numpy().ravel().astype(float) for name in ("*.tif", "*.png")
    )
    slope, offset = np.polyfit(ours, expected, 1)
    assert abs(slope * ours + offset - expected).max() <= 2 and 0.9 < slope < 1.1


def drawing(seed: int, ground: tuple, colour: tuple) -> Image.Image:
    """Lines on a ground, RGBA."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (40, 40), ground)
    ImageDraw.Draw(image).line([tuple(point) for point in rng.integers(2, 38, (5, 2)).tolist()], colour, 3)
    return image


def test_a_drawing_on_transparent_ground_is_seen_as_on_white(tmp_path, decoded):
    black = (0, 0, 0, 255)
    for name, ground in {"a": (0, 0, 0, 0), "b": (255, 255, 255, 0), "c": (255, 255, 255, 255)}.items():
        (tmp_path / name).mkdir()
        for i in range(60):
            drawing(i, ground, black).save(tmp_path / name / f"{i:02}.png")
    a, b, c = (decoded(sorted((tmp_path / name).iterdir()))[0].numpy() for name in "abc")
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, c)
    assert not decode.blank(c).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_white_drawing_on_transparent_ground_is_seen_on_grey(tmp_path, decoded, mode):
    drawing(0, (255, 255, 255, 0), (255, 255, 255, 255)).convert(mode).save(tmp_path / "white.png")
    images = decoded([tmp_path / "white.png"])[0]
    assert images.unique().tolist() == [128, 255] and len(images[0]) == (1 if mode == "LA" else 3)
    assert decode.upright(tmp_path / "white.png").convert("L").getpixel((0, 0)) == 128


def test_what_is_half_transparent_lets_white_through(tmp_path, decoded):
    Image.new("RGBA", (4, 4), (200, 0, 100, 51)).save(tmp_path / "1.png")
    assert abs(decoded([tmp_path / "1.png"])[0][0, :, 0, 0].numpy() - [244.0, 204, 224]).max() <= 1


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(64))], ids=["opaque", "one index", "an alpha a colour"])
def test_a_palette_becomes_its_colours(tmp_path, decoded, transparency):
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    image.save(tmp_path / "p.png", **({} if transparency is None else {"transparency": transparency}))
    images, _, unreadable, notes = decoded([tmp_path / "p.png"])
    alpha = {None: np.ones(64), 3: np.arange(64) != 3}.get(transparency, np.arange(64) / 255).reshape(8, 8)
    colours = np.stack([indices, 255 - indices, np.full_like(indices, 7)])
    assert abs(images[0].numpy() - (colours * alpha + 255 * (1 - alpha))).max() <= 1
    assert unreadable == [] and len(notes) == (transparency is not None)


@pytest.mark.parametrize("kind", ["gif", "webp", "tif", "png", "avif"])
def test_the_first_frame_that_is_not_blank_is_used(tmp_path, decoded, kind):
    white, lines, others = Image.new("RGB", (40, 40), "white"), *(noise_image("RGB", (40, 40), i) for i in (1, 2))
    animations = {"a": [lines, others], "b": [white, white, lines, others], "c": [white], "d": [lines]}
    options = {"webp": {"lossless": True}, "avif": {"quality": 100}}.get(kind, {})
    for name, (first, *rest) in animations.items():
        first.save(tmp_path / f"{name}.{kind}", save_all=True, append_images=rest, **options)
    images, _, _, notes = decoded(sorted(tmp_path.iterdir()))
    for image in images[[1, 3]]:
        assert abs(image.float() - images[0].float()).mean() < (20 if kind in ("gif", "avif") else 1)
    assert decode.blank(images.numpy()).tolist() == [False, False, True, False]
    assert [note.split(" ")[:2] for note in notes] == [["2", "animations"], ["1", "blank"]]


def test_an_animation_of_blank_frames_and_damaged_pages(tmp_path, decoded):
    """The first frame is used if there is no better one; pages that cannot be read are no reason to miss the first."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "1.png", save_all=True, append_images=frames[1:])
    noise_image("RGB", (8, 8)).save(tmp_path / "2.tif", save_all=True, append_images=frames)
    frames[0].save(tmp_path / "3.tif", save_all=True, append_images=frames)
    for name in ("2.tif", "3.tif"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    images, kept, _, _ = decoded(sorted(tmp_path.iterdir()))
    assert kept == [0, 1, 2] and images[0, :, 0, 0].tolist() == images[2, :, 0, 0].tolist() == [255, 0, 0]
    np.testing.assert_array_equal(images[1].permute(1, 2, 0).numpy(), noise_image("RGB", (8, 8)))


def test_the_second_picture_of_a_camera_is_no_page(tmp_path, decoded):
    noise_image("RGB", (16, 16)).save(
        tmp_path / "1.jpg", "MPO", save_all=True, append_images=[noise_image("RGB", (8, 8))]
    )
    assert decoded([tmp_path / "1.jpg"])[3] == []


def test_cmyk(tmp_path, decoded):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert abs(decoded([tmp_path / "red.jpg"])[0].float().mean((2, 3)).numpy() - [255, 0, 0]).max() <= 3


def test_blank_images_are_counted(tmp_path, decoded, monkeypatch):
    """Two levels more or less count as one colour, in each channel for itself."""
    pixels = np.full((5, 9, 7, 3), (10, 200, 90), np.uint8)
    pixels[1, 3, 3] += 2
    pixels[2, 3, 3, 1] += 3
    pixels[3] = np.random.default_rng(0).integers(0, 256, (9, 7, 3))
    images, _, _, notes = decoded(saved(tmp_path, map(Image.fromarray, pixels)))
    assert decode.blank(images.numpy()).tolist() == [True, True, False, False, True]
    assert [note.split(",")[0] for note in notes] == ["3 blank images"]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_jpeg_of_too_many_scans_is_listed(tmp_path, decoded, monkeypatch, as_bytes):
    noise_image("L", (64, 64)).save(tmp_path / "1.jpg", progressive=True)
    noise_image("L", (64, 64)).save(tmp_path / "2.jpg")
    few = (tmp_path / "1.jpg").read_bytes()
    many = few[:-2] + few[few.rindex(b"\xff\xda") : -2] * 400 + few[-2:]
    (tmp_path / "3.jpg").write_bytes(many)
    monkeypatch.setattr(decode, "SCANNED", 64 * 64 * 100)
    paths = sorted(tmp_path.glob("*.jpg"))
    parts = [cache.Block(3, lambda: (io.BytesIO(path.read_bytes()) if as_bytes else path for path in paths))]
    _, originals, [(id, reason)], _ = cache.images(parts, "123", paths, tmp_path / "cache")
    assert originals.rows.tolist() == [0, 1] and id == "3" and "scans" in reason


def test_what_cannot_be_read_is_listed_and_the_others_keep_their_order(tmp_path, decoded):
    paths = saved(tmp_path, [noise_image("RGB", (64, 64), i) for i in range(80)], ".jpg")
    paths[1].write_bytes(paths[1].read_bytes()[:1500])
    paths[2].write_bytes(b"")
    paths[40].write_text("this is a text")
    paths[70] = tmp_path / "missing.png"
    reasons = {"001.jpg": "truncated", "002.jpg": "not an image", "040.jpg": "not an image", "missing.png": "such"}
    images, kept, unreadable, _ = decoded(paths)
    assert kept == [i for i in range(80) if i not in (1, 2, 40, 70)]
    np.testing.assert_array_equal(images.numpy(), slow_reference([paths[i] for i in kept], "RGB"))
    assert [name for name, _ in unreadable] == list(reasons)
    assert all(reasons[name] in reason for name, reason in unreadable)


@pytest.mark.parametrize(
    ("limit", "value", "size", "said"),
    [
        ("MAX_PIXELS", 99, (10, 10), "10 x 10 pixels are too many: there may be 99"),
        ("MAX_SIDE", 20, (2, 21), "2 x 21 pixels are too many"),
        ("MAX_BYTES", 300, (40, 40), "bytes are more than 300"),
        ("MAX_IMAGE_PIXELS", 100, (30, 30), "900 pixels"),  # Pillow's own
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_an_image_too_large_is_listed(tmp_path, decoded, monkeypatch, limit, value, size, said, as_bytes):
    monkeypatch.setattr(Image if limit == "MAX_IMAGE_PIXELS" else decode, limit, value)
    paths = saved(tmp_path, [noise_image("L", size) for size in [(4, 4), size]])
    images = cache.images(
        [cache.Block(2, lambda: (io.BytesIO(path.read_bytes()) if as_bytes else path for path in paths))],
        ["a", "b"], paths, tmp_path / "cache")  # fmt: skip
    assert images[1].rows.tolist() == [0] and [id for id, _ in images[2]] == ["b"] and said in images[2][0][1]


def test_an_icon_cannot_hide_a_larger_image(tmp_path, decoded):
    """It says it has 16 x 16 pixels, whatever the PNG file inside has."""
    for name, inner in {"a.png": png(70_000, 1), "b.png": png(16, 16)}.items():
        head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22)
        (tmp_path / name).write_bytes(head + inner)
    _, kept, [(id, reason)], _ = decoded([tmp_path / "a.png", tmp_path / "b.png"])
    assert kept == [1] and id == "a.png" and "70000 x 1 pixels are too many" in reason


def test_what_pillow_and_libtiff_say_of_damage_is_not_heard(tmp_path, decoded, monkeypatch, capfd):
    noise_image("1", (24, 24)).save(tmp_path / "1.tif", compression="group4")
    content = bytearray((tmp_path / "1.tif").read_bytes())
    content[10:30] = bytes(20)
    (tmp_path / "1.tif").write_bytes(content)
    paths = saved(tmp_path, [noise_image("L", (30, 30))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(Image.DecompressionBombWarning):  # it would
        Image.open(paths[0])
    before = list(warnings.filters)
    assert decoded([*paths, tmp_path / "1.tif"])[1][0] == 0
    assert warnings.filters == before and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("large, alone", [(0, True), (1 << 40, False)])
def test_large_images_are_decoded_one_at_a_time(tmp_path, decoded, monkeypatch, large, alone):
    locked, reference = [], decode._upright
    monkeypatch.setattr(decode, "LARGE_PIXELS", large)
    monkeypatch.setattr(decode, "_upright", lambda *rest: locked.append(decode._large.locked()) or reference(*rest))
    decoded(saved(tmp_path, [noise_image("L", (4, 4))] * 4))
    assert locked == [alone] * 4


def test_every_image_is_decoded_once(tmp_path, decoded, monkeypatch):
    """Pillow decodes a whole PNG image when it is asked for the camera's notes."""
    calls, prepare = [], PngImagePlugin.PngImageFile.load_prepare
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda self: calls.append(prepare(self)))
    decoded(saved(tmp_path, [noise_image("RGB", (8, 8), i) for i in range(5)]))
    assert len(calls) == 5


@pytest.mark.parametrize("in_memory", [1 << 30, 0])
def test_an_array_lies_in_memory_or_in_a_temporary_file(monkeypatch, in_memory):
    monkeypatch.setattr(decode, "IN_MEMORY", in_memory)
    array = decode.allocate((3, 1, 2, 2))
    array[:] = 7
    assert array.shape == (3, 1, 2, 2) and array.dtype == np.uint8 and array.sum() == 84
    assert isinstance(array, np.memmap) == (in_memory == 0)


@pytest.mark.parametrize(
    ("maximum", "current", "free"), [("max", "5", 4096), ("3000", "1000", 2000), ("9999999", "0", 4096)]
)
def test_free_memory_is_the_machines_or_the_control_groups(tmp_path, monkeypatch, maximum, current, free):
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  4 kB\n")
    (tmp_path / "memory.max").write_text(f"{maximum}\n")
    (tmp_path / "memory.current").write_text(f"{current}\n")
    monkeypatch.setattr(decode, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(decode, "GROUP", tmp_path)
    assert decode.free_memory() == free
    monkeypatch.setattr(decode, "MEMORY", tmp_path / "none")
    monkeypatch.setattr(decode, "GROUP", tmp_path / "none")
    assert decode.free_memory() == float("inf")


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "jpg"])
def test_images_that_lie_count_as_upright(tmp_path, decoded, kind):
    """So that those of one size, once upright, keep it."""
    exif = Image.Exif()
    exif[274] = 6
    for i in range(2):
        noise_image("RGB", (20, 8)).save(tmp_path / f"{i}.{kind}", exif=exif)
    images, _, unreadable, notes = decoded([tmp_path / f"{i}.{kind}" for i in range(2)])
    assert images.shape == (2, 3, 20, 8) and (unreadable, notes) == ([], [])
