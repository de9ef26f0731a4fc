"""The choices of an audit: budget, start, views, epochs, what is flagged."""

import dataclasses

import numpy as np
import pytest
import torch
from expected import refused

from ptglab.audit import stages
from ptglab.detect import label_errors
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError
from ptglab.train import augment, backbones

QUICK = stages.BUDGETS["quick"]
COLOUR = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GREY = COLOUR[:, :1]


def begin(name: str = "auto", method: str = "auto", images=COLOUR, budget=QUICK, width: int = 4):
    return stages.start(name, method, budget, "resnet18", width, images, 0)


@pytest.fixture
def no_weights(monkeypatch):
    """No ImageNet weights in the cache, and no network."""

    def missing(name, images, weights=None):
        raise InputError("no ImageNet weights of resnet18 here")

    monkeypatch.setattr(backbones, "imagenet", missing)


@pytest.fixture
def weights(monkeypatch):
    """Weights that can be had."""
    monkeypatch.setattr(backbones, "imagenet", lambda name, images, weights=None: backbones.build(name, 5, images, 0))


def test_every_detector_can_decide_and_flags_are_ways_or_numbers():
    for name in label_errors.DETECTORS:
        assert stages.plan("quick", name, "own") is QUICK
    assert stages.plan("thorough", "knn", "25").tuned_epochs > 0
    for wrong in ("-3", "1.5", "mine", ""):
        refused(f"'{wrong}'", "own, rate", call=stages.plan)("quick", "knn", wrong)


def refuse(out, *makes):
    with pytest.raises(InputError, match="refused"), stages.refusal_leaves_nothing(out):
        for name in makes:
            (out / name).mkdir(parents=True)
        raise InputError("refused")


def test_a_refusal_deletes_nothing_but_what_it_left(tmp_path):
    refuse(tmp_path / "nothing", "features")
    refuse(tmp_path / "work", "pretrain")
    (tmp_path / "before").mkdir()
    refuse(tmp_path / "before")
    (tmp_path / "link").symlink_to("elsewhere")
    refuse(tmp_path / "link")
    refuse(tmp_path / ("n" * 300))
    assert {path.name for path in tmp_path.iterdir()} == {"work", "before", "link"}


def test_a_refusal_leaves_the_folder_of_another_process(tmp_path, monkeypatch):
    """It may have begun there meanwhile, and not have come to the first stage."""

    def taken(*_, **__):
        raise InputError("another process is at work")

    monkeypatch.setattr(stages.files, "lock", taken)
    refuse(tmp_path / "theirs", "arrays")
    assert (tmp_path / "theirs" / "arrays").exists()


def test_grey_that_is_kept_as_colour_is_grey():
    assert torch.equal(stages.without_empty_colours(GREY.repeat(1, 3, 1, 1)), GREY)
    assert stages.without_empty_colours(GREY) is GREY
    one = GREY.repeat(5000 // 12 + 1, 3, 1, 1)
    one[-1, 2, 0, 0] = one[-1, 0, 0, 0] ^ 128  # one coloured pixel, in the last block
    assert stages.without_empty_colours(one) is one


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("images", [COLOUR, GREY], ids=["colour", "grey"])
def test_views_mirror_only_if_asked_and_keep_grey_whole(flip, images):
    for name, chosen in stages.views(images, flip, "photos").items():
        for recipe in augment.preset(chosen):
            assert (recipe.flip > 0) == flip
            assert recipe.crop_scale[0] >= 0.4 or (images is COLOUR and name != "weak")
        assert chosen.startswith("grey") == (images is GREY and name != "weak")


def test_quick_begins_with_patches(no_weights):
    network, began, method = begin()
    assert network is None and method == "patches"
    assert began.startswith("nothing") and "no ImageNet weights" in began
    assert begin(images=GREY) == (None, "nothing", "patches")  # grey images do not ask for them
    assert begin(method="patches") == (None, "nothing", "patches")
    network, began, method = begin(method="barlow_twins")
    assert network.sizes["width"] == 4 and method == "barlow_twins"
    network, _, method = begin("scratch", budget=stages.BUDGETS["standard"], width=0)
    assert network.sizes["width"] == 32 and method == "simclr"


def test_imagenet_weights_are_taken_where_they_are(weights):
    network, began, method = begin()
    assert network.sizes["width"] == 5 and began == "ImageNet weights" and method == "simclr"
    assert begin(images=GREY)[0] is None
    assert begin("imagenet", images=GREY)[0].sizes["channels"] == 1
    assert begin("scratch")[0] is None


def test_a_start_that_is_asked_for_must_be_there(no_weights, tmp_path):
    refused("no ImageNet weights of resnet18 here", call=begin)("imagenet")
    refused("unknown start 'scrach'", "'scratch'", call=begin)("scrach")
    refused("patches learn from the images alone", call=begin)("imagenet", "patches")
    ours = tmp_path / "ours.safetensors"
    backbones.save(ours, backbones.build("resnet18", 6, COLOUR, 0))
    network, began, method = begin(str(ours))
    assert network.sizes["width"] == 6 and began == str(ours) and method == "simclr"
    refused(str(ours), "3 channels, not 1", call=begin)(str(ours), images=GREY)
    (tmp_path / "text.pth").write_text("no weights")
    refused("no ImageNet weights", call=begin)(str(tmp_path / "text.pth"))


def test_epochs_are_what_the_budget_buys():
    few = torch.empty(1000, 3, 32, 32, dtype=torch.uint8)
    many = torch.empty(1, 3, 32, 32, dtype=torch.uint8).expand(50_000, 3, 32, 32)
    narrow, wide = (backbones.build("resnet18", width, COLOUR, 0) for width in (16, 32))
    plan = dataclasses.replace(QUICK, work=1e5, most_epochs=60)
    assert stages.epochs(-1, plan, few, narrow, "nothing") == 60  # 100, but no more than there may be
    assert stages.epochs(-1, plan, few, wide, "nothing") == 25  # four times the cost
    assert stages.epochs(-1, plan, few[:, :, :16, :16], wide, "nothing") == 60
    assert stages.epochs(-1, plan, many, narrow, "nothing here") == stages.FEWEST_EPOCHS
    assert stages.epochs(-1, plan, many, narrow, "ImageNet weights") == stages.epochs(-1, plan, many, None, "") == 0
    assert stages.epochs(7, plan, many, narrow, "nothing") == 7 and stages.epochs(7, plan, many, None, "") == 0


def test_flag_by_own_threshold_by_rate_or_by_number():
    labels, probs = np.array([0, 1, 2, 0]), np.array([[0.9, 0.1, 0], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    ours = Suspects(np.array([0.9, 0.5, 0.1, 0.2], np.float32), np.arange(4) == 2, np.array([0, 1, 0, 1]))
    assert stages.flag(ours, "own", 0.5, labels, probs) is ours
    for by, rows in (("rate", [2, 3]), ("0", []), ("3", [1, 2, 3])):
        again = stages.flag(ours, by, 0.5, labels, probs)
        assert list(np.flatnonzero(again.flagged)) == rows
        assert (again.suggested != labels)[again.flagged].all()
    refused("5 labels", call=stages.flag)(ours, "5", 0.5, labels, probs)
