"""Images that came, went or changed: which are known, and features and decisions of these stay."""

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from expected import refused
from PIL import Image
from torch import nn

from ptglab import data
from ptglab.audit import stages as steps
from ptglab.audit import update
from ptglab.audit.corrections import Corrections
from ptglab.audit.reopen import Findings
from ptglab.detect.suspects import Suspects
from ptglab.lab import runs
from ptglab.train import engine

PLACE = engine.place("cpu")


class Means(nn.Module):
    """A network whose features are exact; `seen` counts the images it was given."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return torch.stack([(255 * x).round()[:, 0, 0, i] for i in range(3)], 1)


def put(path: Path, number: int, side: int = 8) -> None:
    """Write a grey picture that no other number has."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side), np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """400 pictures of two classes."""
    (tmp_path / "photos").mkdir()
    for i in range(400):
        put(tmp_path / "photos" / "ab"[i % 2] / f"{i:03}.png", i)
    return tmp_path / "photos"


def audit(run: runs.Run, source: Path, again: bool = True) -> tuple[update.Change | None, np.ndarray, int]:
    """Return (what has changed, the features, how many images the network saw), and leave later stages."""
    images, network = data.load(source), Means()
    change = update.begin(run, images, images.images) if again else run.keep_fingerprint(images.fingerprint)
    if not run.stage("features").done:
        steps.features(run, {"means": network}, images, images.images, 0, PLACE, choose=False)
    return change, np.array(run.stage("features").array("raw0")), network.seen


def expected(source: Path) -> np.ndarray:
    return data.load(source).images[:, 0, 0, :3].numpy().astype(np.float32)


@pytest.fixture
def run(tmp_path, photos) -> runs.Run:
    """A finished audit of them, as far as it matters here."""
    run = runs.Run(tmp_path / "run")
    run.path.mkdir()
    *_, seen = audit(run, photos, again=False)
    assert seen == 400
    for name in ("pretrain", *update.AGAIN):
        run.stage(name).finish()
    return run


def alter(photos: Path) -> None:
    """20 come, 5 go, one is another picture now, and one is moved."""
    for i in range(400, 420):
        put(photos / "ab"[i % 2] / f"{i % 7}-{i}.png", i)
    for i in range(0, 50, 10):
        (photos / "a" / f"{i:03}.png").unlink()
    put(photos / "b" / "123.png", 1000)
    (photos / "a" / "200.png").rename(photos / "b" / "200.png")


def stages(run: runs.Run) -> set[str]:
    return {path.name for path in run.path.iterdir() if path.is_dir()}


def test_what_is_known_is_kept_and_the_rest_is_done(run, photos):
    before = data.load(photos).ids
    alter(photos)
    change, features, seen = audit(run, photos)
    now = data.load(photos).ids
    assert set(change.new) == set(now) - set(before) and len(change.new) == 21
    assert set(change.gone) == set(before) - set(now) and len(change.gone) == 6
    assert change.changed == ["b/123.png"]
    for id, row in zip(now, change.known, strict=True):
        moved = id.replace("b/200", "a/200")
        assert row == (before.index(moved) if moved in before and id != "b/123.png" else -1)
    assert seen == 21 and (features == expected(photos)).all()
    assert stages(run) == {"pretrain", "features"}
    assert "21 images are new, 6 gone, 1 changed; the features of 394 of 415 are known" in str(change)
    run.keep_fingerprint(data.load(photos).fingerprint)  # and is no audit of the images before any more


def test_nothing_is_done_where_nothing_has_changed(run, photos):
    change, _, seen = audit(run, photos)
    assert seen == 0 and not (change.new or change.gone or change.changed) and {*update.AGAIN} < stages(run)
    for path in (photos / "b").iterdir():
        os.utime(path, (0, 0))  # the content counts
    assert audit(run, photos)[2] == 0 and {*update.AGAIN} < stages(run)


def test_other_labels_keep_the_features_and_are_judged_again(run, photos):
    for i in range(0, 40, 2):
        (photos / "a" / f"{i:03}.png").rename(photos / "b" / f"{i:03}.png")
    change, features, seen = audit(run, photos)
    assert len(change.new) == len(change.gone) == 20 and seen == 0 and not {*update.AGAIN} & stages(run)
    assert (features == expected(photos)).all()


def test_an_image_changed_in_place_between_those_of_the_fingerprint_is_found(run, photos):
    images = data.load(photos)
    many = replace(images, images=images.images.repeat(8, 1, 1, 1), labels_given=np.zeros(3200, int), files=(),
                   ids=[str(i) for i in range(3200)])  # fmt: skip
    many.images[1, 0, 0, 0] = 0
    other = replace(many, images=many.images.clone())
    other.images[1, 0, 0, 0] = 1
    assert many.fingerprint == other.fingerprint and update.hashes(many) != update.hashes(other)
    change = update.compare(*(update.listed(s, s.images) for s in (many, other)))
    assert change.changed == ["1"] and np.flatnonzero(change.known < 0).tolist() == [1]


def test_pixels_of_another_size_are_all_learned_again(run, photos):
    """One image of another size makes all of them squares of another side: nothing is known, though no file changed."""
    for i in range(400, 820):
        put(photos / "a" / f"{i}.png", i, 40)
    change, features, seen = audit(run, photos)
    assert (change.known == -1).all() and not change.changed and len(change.new) == 420
    assert seen == 820 and stages(run) == {"features"} and (features == expected(photos)).all()


@pytest.mark.parametrize("name", ["os.replace", "shutil.rmtree", "os.fsync"])
@pytest.mark.parametrize("count", range(4))
def test_an_update_that_was_killed_goes_on(run, photos, monkeypatch, name, count):
    """At whichever call it is stopped; and the images may change once more."""
    alter(photos)
    module, function = {"os": os, "shutil": shutil}[name.split(".")[0]], name.split(".")[1]
    original, calls = getattr(module, function), iter(range(count))

    def stop(*arguments, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(module, function, stop)
        audit(run, photos)
    assert (audit(run, photos)[1] == expected(photos)).all()
    put(photos / "a" / "777.png", 777)
    _, features, seen = audit(run, photos)
    assert seen == 1 and (features == expected(photos)).all()


def test_a_run_that_does_not_say_which_images_it_is_of_is_refused(run, photos):
    (run.path / "features" / "images.csv").unlink()
    audit(run, photos)  # the same images need no update
    alter(photos)
    refused(str(run.path), call=audit)(run, photos)
    assert {*update.AGAIN, "features"} < stages(run)


def test_hashes_are_of_files_or_else_of_pixels_and_a_file_that_is_gone_is_said(photos):
    images = data.load(photos)
    of_files, of_pixels = update.hashes(images), update.hashes(replace(images, files=()))
    assert len(set(of_files)) == len(set(of_pixels)) == 400 and not set(of_files) & set(of_pixels)
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in of_files + of_pixels)
    lying = replace(images, files=(), images=torch.zeros(400, 1, 4, 16, dtype=torch.uint8))
    assert not set(update.hashes(lying)) & set(update.hashes(replace(lying, images=lying.images.mT)))
    Path(images.files[7]).unlink()
    refused("changes while it is read", call=update.hashes)(images)


def test_decisions_stay_on_what_is_still_there_and_others_are_set_aside(run, photos, tmp_path):
    review = runs.Run(tmp_path / "review")
    review.path.mkdir()

    def found() -> Findings:
        images = data.load(photos)
        n = len(images)
        return Findings(
            run.path, str(photos), images, Suspects(np.zeros(n), np.ones(n, bool), np.zeros(n, int)), "", {}
        )

    assert found().review(review) == 0
    decisions, stay = Corrections(review.path / "corrections.csv"), [1, 3, 5, 123, 7]
    for i in (0, 1, 3, 200, 5, 123, 7, 10):  # 0 and 10 will go, 200 be moved, 123 be another picture
        decisions.add(f"{'ab'[i % 2]}/{i:03}.png", "ab"[i % 2], "suggestion", "ba"[i % 2])
    assert found().review(review) == 0
    before = Corrections(decisions.path).rows
    alter(photos)
    audit(run, photos)
    assert found().review(review) == 4 and found().review(review) == 0
    kept, aside = (
        Corrections(decisions.path.with_name(f"{name}.csv")).rows for name in ("corrections", "corrections_aside")
    )
    assert [d.id for d in kept] == [f"b/{i:03}.png" for i in stay if i != 123]
    assert sorted(kept + aside) == sorted(before)
    labels, _ = Corrections(decisions.path).applied(
        {id: row for row, id in enumerate(found().images.ids)}, found().images.labels_given, ["a", "b"]
    )
    assert (labels != found().images.labels_given).sum() == 4
    (run.path / "features" / "images.csv").unlink()  # as in a run that is no audit
    assert found().review(review) == 0
    (photos / "a" / "002.png").unlink()
    refused("other images", call=found().review)(review)
