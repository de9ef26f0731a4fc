"""Whatever is in a folder: one clear line, or every image that can be read, with its own label and pixels."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import CASES, CLASSES, colour, label

from ptglab import data
from ptglab.data import cache
from ptglab.errors import InputError

LARGEST = 48


def assert_shown(text):
    """One line of UTF-8 that does nothing to a terminal; joiners and marks of direction are part of some scripts."""
    assert all(c.isprintable() or c in "\u200b\u200d\ufeff" for c in text), ascii(text)
    text.encode()


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.name)[1:-1][:60])
def test_bad_input(case, tmp_path, capfd, monkeypatch):
    # A bar shows what is slow, as on a busy machine.
    monkeypatch.setattr(cache, "tqdm", partial(cache.tqdm, disable=True))
    source, labels = case.build(tmp_path)
    if case.expected == "refused":
        with pytest.raises(InputError) as caught:
            data.load(source, labels=labels, at_most=LARGEST)
        assert_shown(str(caught.value))
        assert [word for word in case.words if word not in str(caught.value)] == [], str(caught.value)
    else:
        image_set = data.load(source, labels=labels, at_most=LARGEST)
        assert len(image_set) == case.readable, image_set.unreadable
        assert len(image_set.unreadable) == case.listed, image_set.unreadable
        assert len(np.unique(image_set.labels_given)) == case.classes
        assert len(image_set.images) == len(image_set.ids) == len(image_set.labels_given)
        assert max(image_set.images.shape[2:]) <= LARGEST
        names = image_set.ids + [id for id, _ in image_set.unreadable]
        assert len(names) == len(set(names))
        for text in (*names, *image_set.class_names, *image_set.notes, *(why for _, why in image_set.unreadable)):
            assert_shown(text)
        assert len(image_set.fingerprint) == 64
        check_rows(image_set, source)
    assert capfd.readouterr() == ("", "")


def check_rows(image_set, source):
    """Every row of a folder has the id, the label and, where it is planted, the colour of its file."""
    rows = zip(image_set.ids, image_set.files, image_set.labels_given, image_set.images, strict=bool(image_set.files))
    listed = any(path.is_file() and path.suffix.lower() == ".csv" for path in source.glob("*"))
    for id, path, given, image in ((id, Path(file), *rest) for id, file, *rest in rows):
        relative = os.fsencode(path.relative_to(source)).decode("utf-8", "backslashreplace")
        assert path.is_file() and (id == relative or "\\" in id)
        name, own = path.name, image_set.class_names[given]
        number = CLASSES.index(label(name))
        assert own in id.split("/")[:2] or listed
        assert (
            label(name) in own
            or own in (str(number), str(number + 1) * 5000)
            or not name.startswith("good")
            or not listed
        )
        if name.startswith("good"):
            assert image.flatten(1).unique(dim=1).flatten().tolist() == list(colour(name))


def test_there_are_many_and_no_two_are_called_alike():
    assert len({case.name for case in CASES}) == len(CASES) >= 200
