"""Small trees in the layouts that WebVision, Clothing1M and ANIMAL-10N are published in."""

import pytest
from PIL import Image

from ptglab import data
from ptglab.data import published
from ptglab.errors import InputError

SYNSETS = ["n01440764 tench, Tinca tinca", "n02012849 crane", *(f"n0{i:07} thing {i}" for i in range(2, 59))]
SYNSETS += ["n03126707 crane"]  # 60 classes, two of one name
CLOTHES = ["T-Shirt", "Shirt", "Knitwear", "Chiffon", "Down Coat"]


def write(folder, name, *lines):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


def draw(folder, *paths):
    for i, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i % 3, 9), (40 * i % 256, 90, 10)).save(folder / path)


@pytest.fixture
def webvision(tmp_path):
    google = {"google/q0001/b.jpg": 1, "google/q0001/a.jpg": 0, "google/q0002/c.jpg": 59, "google/q0002/d.jpg": 49}
    flickr = {"flickr/q0001/e.jpg": 0, "flickr/q0003/f.jpg": 50}
    val = {"val000001.jpg": 50, "val000002.jpg": 49, "val000003.jpg": 0}
    write(tmp_path, "info/synsets.txt", *SYNSETS)
    lists = {"train_filelist_google": google, "train_filelist_flickr": flickr, "val_filelist": val}
    for name, rows in lists.items():
        write(tmp_path, f"info/{name}.txt", *(f"{path} {number}" for path, number in rows.items()))
    draw(tmp_path, *google, *flickr, *(f"val_images_256/{name}" for name in val))
    return tmp_path


@pytest.fixture(params=["", "annotations/"])
def clothing1m(request, tmp_path):
    """Images 0 to 3 are noisy train; 4 to 6 have both labels, 6 is in test, where 7 and 8 are, too."""
    paths = [f"images/{i}/0{i}/{i},{i}.jpg" for i in range(9)]
    keys = {"noisy_train": [3, 0, 1, 2], "clean_train": [4], "clean_val": [5], "clean_test": [8, 7, 6]}
    for name, rows in keys.items():
        write(tmp_path, f"{request.param}{name}_key_list.txt", *(paths[i] for i in rows))
    write(tmp_path, f"{request.param}noisy_label_kv.txt", *(f"{paths[i]} {i % 5}" for i in range(7)))
    write(tmp_path, f"{request.param}clean_label_kv.txt", *(f"{paths[i]} {(i + i % 2) % 5}" for i in range(4, 9)))
    write(tmp_path, f"{request.param}category_names_eng.txt", *CLOTHES)
    draw(tmp_path, *paths)
    return tmp_path


@pytest.fixture
def animal10n(tmp_path):
    draw(tmp_path, "training/9_10002.jpg", "training/0_10001.jpg", "training/4_7.png", "training/stray.jpg")
    draw(tmp_path, "testing/5_img_1.jpg", "testing/0_10001.jpg", "testing/12_1.jpg")
    (tmp_path / "training" / "0_notes.txt").touch()
    return tmp_path


def labelled(image_set, which="given"):
    """Return {id: class name}."""
    numbers = getattr(image_set, f"labels_{which}")
    return dict(zip(image_set.ids, (image_set.class_names[i] for i in numbers), strict=True))


def test_mini_webvision(webvision):
    assert published.detect(webvision) == "webvision" and data.splits(webvision) == ["train", "test"]
    train, test = data.load(webvision), data.load(str(webvision), "test")
    assert train.ids == ["google/q0001/b.jpg", "google/q0001/a.jpg", "google/q0002/d.jpg"]
    assert train.labels_given.tolist() == [1, 0, 49] and train.labels_true is None
    assert train.files == [str(webvision / id) for id in train.ids] and not train.unreadable
    assert test.ids == ["val_images_256/val000002.jpg", "val_images_256/val000003.jpg"]
    assert test.labels_given.tolist() == test.labels_true.tolist() == [49, 0]
    assert len(train.class_names) == 50 and train.class_names == test.class_names
    assert train.class_names[:3] == ["tench, Tinca tinca", "n02012849 crane", "thing 2"]
    for name in ("", "label", "mini"):
        assert data.load(webvision, labels=name).ids == train.ids


def test_all_of_webvision(webvision):
    google, both = (data.load(webvision, labels=labels) for labels in ("google", "all"))
    assert google.ids == [id for id in both.ids if id.startswith("google")] and len(google) == 4
    assert both.labels_given.tolist() == [1, 0, 59, 49, 0, 50]
    assert len(both.class_names) == 60 and both.class_names[59] == "n03126707 crane"
    assert data.load(webvision, "test", "google").labels_true.tolist() == [50, 49, 0]


@pytest.mark.parametrize("train", ["train", "google_resized_256"])
@pytest.mark.parametrize("val", ["val", "val_images"])
def test_where_webvision_is_unpacked(webvision, train, val):
    (webvision / train).mkdir()
    (webvision / "google").rename(webvision / train / "google")
    (webvision / "val_images_256").rename(webvision / val)
    assert data.load(webvision).ids[0] == f"{train}/google/q0001/b.jpg"
    assert data.load(webvision, "test").ids[0] == f"{val}/val000002.jpg"


def test_no_validation_images_no_test(webvision):
    (webvision / "val_images_256").rename(webvision / "elsewhere")
    assert data.splits(webvision) == ["train"]


def test_clothing1m(clothing1m):
    assert published.detect(clothing1m) == "clothing1m" and data.splits(clothing1m) == ["train", "test"]
    train, test = data.load(clothing1m), data.load(clothing1m, "test")
    assert train.ids == [f"images/{i}/0{i}/{i},{i}.jpg" for i in (3, 0, 1, 2)]
    assert train.labels_given.tolist() == [3, 0, 1, 2] and train.labels_true is None
    assert test.labels_given.tolist() == test.labels_true.tolist() == [3, 3, 1]
    assert train.class_names == test.class_names == CLOTHES


def test_clothing1m_with_both_labels(clothing1m):
    both, test = data.load(clothing1m, labels="both"), data.load(clothing1m, "test", "both")
    assert both.ids == ["images/4/04/4,4.jpg", "images/5/05/5,5.jpg"] and not set(both.ids) & set(test.ids)
    assert labelled(both) == dict(zip(both.ids, ["Down Coat", "T-Shirt"], strict=True))
    assert labelled(both, "true") == dict(zip(both.ids, ["Down Coat", "Shirt"], strict=True))
    assert test.ids == data.load(clothing1m, "test").ids and (test.labels_given == test.labels_true).all()


def test_animal10n(animal10n):
    assert published.detect(animal10n) == "animal10n" and data.splits(animal10n) == ["train", "test"]
    train, test = data.load(animal10n), data.load(animal10n, "test")
    assert labelled(train) == {"training/0_10001.jpg": "cat", "training/4_7.png": "cheetah",
                               "training/9_10002.jpg": "guinea pig"}  # fmt: skip
    assert train.labels_given.tolist() == [0, 4, 9] and train.labels_true is None
    assert train.unreadable == [("training/stray.jpg", "has no label")]
    assert labelled(test, "true") == labelled(test) == {"testing/0_10001.jpg": "cat", "testing/5_img_1.jpg": "jaguar"}
    assert [id for id, _ in test.unreadable] == ["testing/12_1.jpg"]
    assert train.class_names == test.class_names and len(train.class_names) == 10


@pytest.mark.parametrize("paths", [["training/a.jpg", "tested/b.jpg"], ["training/1_2.jpg", "bus/2.jpg"]])
def test_other_folders_are_image_folders(tmp_path, paths):
    draw(tmp_path, *paths)
    assert published.detect(tmp_path) is None and published.detect(tmp_path / paths[0]) is None
    assert set(data.load(tmp_path).class_names) == {path.split("/")[0] for path in paths}


def test_labels_of_another_set_are_refused(webvision):
    with pytest.raises(InputError, match="unknown label column of .* 'al': did you mean 'all'"):
        data.load(webvision, labels="al")
    with pytest.raises(InputError, match="there are mini, google, all"):
        data.load(webvision, labels="both")


@pytest.mark.parametrize(
    "line",
    ["google/q0001/a.jpg", "google/q0001/a.jpg one", "google/q0001/a.jpg -1", "google/q0001/a.jpg 60", " 3",
     "google/q0001/a.jpg 1.0", "google/q0001/a.jpg 99999999999999", "google/q0001/a.jpg ²", "../google/q0001/a.jpg 0",
     "google/../../x.jpg 0", "/etc/passwd 0", "google//a.jpg 0", "google\\..\\a.jpg 0", "a\u202eb.jpg 0"],
)  # fmt: skip
def test_a_wrong_line_is_named(webvision, line):
    write(webvision, "info/train_filelist_google.txt", "google/q0001/a.jpg 0", "", line, "google/q0001/b.jpg 1")
    with pytest.raises(InputError, match=r"^line 3 of .*train_filelist_google.txt .*from 0 to 59$") as refusal:
        data.load(webvision)
    assert str(refusal.value).isprintable()


def test_spaces_windows_line_ends_and_tabs_are_read(webvision):
    draw(webvision, "google/q0001/a b.jpg")
    lines = ["\ufeffgoogle/q0001/a b.jpg 2 \r", "google/q0001/a.jpg\t0\r", "google/q0001/b.jpg  1\r", "\r"]
    (webvision / "info" / "train_filelist_google.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
    assert data.load(webvision).labels_given.tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["info/synsets.txt", "info/train_filelist_google.txt", "info/val_filelist.txt"])
@pytest.mark.parametrize("mend", ["missing", "linked", "other"])
def test_a_list_that_cannot_be_read_is_named(webvision, tmp_path_factory, name, mend):
    content = (webvision / name).read_bytes()
    (webvision / name).unlink()
    if mend == "linked":
        outside = tmp_path_factory.mktemp("outside") / "list.txt"
        outside.write_bytes(content)
        (webvision / name).symlink_to(outside)
    elif mend == "other":
        (webvision / name).write_bytes(b"caf\xe9 0\n")
    with pytest.raises(InputError, match=name):
        data.load(webvision, "test" if "val" in name else "train")


@pytest.mark.parametrize("names", [[], ["", "tench"], ["cat", "", "dog"], ["cat", "dog", "cat"]])
def test_class_names_that_would_shift_the_numbers_are_refused(webvision, names):
    write(webvision, "info/synsets.txt", *names)
    with pytest.raises(InputError, match="info/synsets.txt in .* should name a class in every line, and none twice"):
        data.load(webvision)


def test_what_is_listed_but_not_there_is_left_out(webvision, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    draw(outside, "1.jpg", "q0005/1.jpg")
    here = webvision / "google" / "q0001"
    for name, target in {"out": outside / "1.jpg", "in": "a.jpg", "loop": "loop.jpg", "gone": "no.jpg"}.items():
        (here / f"{name}.jpg").symlink_to(target)
    (webvision / "google" / "q0005").symlink_to(outside / "q0005")
    (webvision / "google" / "q0006").symlink_to("q0001")
    (here / "folder.jpg").mkdir()
    (here / "text.jpg").write_text("no image")
    names = ["a", "out", "in", "loop", "gone", "missing", "folder", "text", "twice", "twice"]
    lines = [f"google/q0001/{name}.jpg {i}" for i, name in enumerate(names)]
    others = ["google/q0005/1.jpg 0", "google/q0006/a.jpg 0", "google/q0007/1.jpg 0", "google/q0001/a.jpg/x.jpg 0"]
    write(webvision, "info/train_filelist_google.txt", *lines, *others, "google/q0001/a.jpg 0")
    draw(webvision, "google/q0001/twice.jpg")
    train = data.load(webvision)
    assert labelled(train) == {"google/q0001/a.jpg": "tench, Tinca tinca", "google/q0001/in.jpg": "thing 2",
                               "google/q0006/a.jpg": "tench, Tinca tinca"}  # fmt: skip
    reasons = {id.removeprefix("google/"): reason for id, reason in train.unreadable}
    absent = "is listed, but there is no such file, or it cannot be opened"
    assert reasons == {
        "q0001/out.jpg": "is behind a link out of the folder, which is not followed: put a copy there",
        "q0005/1.jpg": "is behind a link out of the folder, which is not followed: put a copy there",
        "q0001/twice.jpg": "is listed twice, with different labels", "q0001/text.jpg": "not an image",
        **dict.fromkeys(["q0001/loop.jpg", "q0001/gone.jpg", "q0001/missing.jpg", "q0001/folder.jpg", "q0007/1.jpg",
                         "q0001/a.jpg/x.jpg"], absent),
    }  # fmt: skip


def test_no_listed_image_is_there(webvision):
    (webvision / "google").rename(webvision / "pictures")
    with pytest.raises(InputError, match="holds none of the 3 images listed for train; the first: google/q0001/b.jpg"):
        data.load(webvision)
    write(webvision, "info/train_filelist_google.txt")
    with pytest.raises(InputError, match="none of the 0 images listed for train$"):
        data.load(webvision)
