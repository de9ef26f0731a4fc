"""The choices of an audit: budget, start, views, epochs, what is flagged."""

import dataclasses

import numpy as np
import pytest
import torch
from expected import refused
from torch import nn

from ptglab import data
from ptglab.audit import stages
from ptglab.detect import label_errors
from ptglab.detect.suspects import Suspects
from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.train import augment, backbones, engine

QUICK = stages.BUDGETS["quick"]
COLOUR = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GREY = COLOUR[:, :1]


def begin(name: str = "auto", images=COLOUR, width: int = 4):
    return stages.start(name, "resnet18", width, images, 0)


def test_every_detector_can_decide_and_flags_are_ways_or_numbers():
    for name in label_errors.DETECTORS:
        assert stages.plan("quick", name, "own") is QUICK
    assert stages.plan("thorough", "knn", "25").tuned_epochs > 0
    for wrong in ("-3", "1.5", "mine", ""):
        refused(f"'{wrong}'", "own, rate", call=stages.plan)("quick", "knn", wrong)
    for flag, precision in (("own", 1.5), ("own", -0.1), ("rate", 0.8)):
        refused(f"precision is {precision}", call=stages.plan)("quick", "knn", flag, precision)


def refuse(out, *makes):
    with pytest.raises(InputError, match="refused"), stages.refusal_leaves_nothing(out):
        for name in makes:
            (out / name).mkdir(parents=True)
        raise InputError("refused")


def test_a_refusal_deletes_nothing_but_what_it_left(tmp_path):
    refuse(tmp_path / "nothing", ".")
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


def test_an_audit_begins_with_patches_and_the_embedded_network(monkeypatch):
    def socket(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", socket)
    for images in (COLOUR, GREY):
        networks = begin(images=images)
        assert list(networks) == ["patches", "lite0"] and networks["patches"] is None
        assert networks["lite0"].size == stages.SIZES["lite0"] and stages.epochs(-1, QUICK, images, networks) == 0
    assert begin("patches") == {"patches": None}


def test_a_start_that_is_asked_for_must_be_there_and_fit(monkeypatch, tmp_path):
    def missing(name, images, weights=None):
        raise InputError("no ImageNet weights of resnet18 here")

    monkeypatch.setattr(backbones, "imagenet", missing)
    refused("no ImageNet weights of resnet18 here", call=begin)("imagenet")
    refused("unknown start 'scrach'", "'scratch'", call=begin)("scrach")
    refused("'lite0+lite0'", "once", call=begin)("lite0+lite0")
    refused("one network that learns", call=begin)("scratch+patches+imagenet".replace("imagenet", save(tmp_path)))
    refused(str(tmp_path), "config.json", call=begin)(str(tmp_path))
    ours = save(tmp_path)
    assert begin(ours)[ours].sizes["width"] == 6
    assert list(begin(f"patches+{ours}")) == ["patches", ours]
    refused(ours, "3 channels, not 1", call=begin)(ours, images=GREY)
    (tmp_path / "text.pth").write_text("no weights")
    refused("no ImageNet weights", call=begin)(str(tmp_path / "text.pth"))


def save(folder) -> str:
    path = folder / "ours.safetensors"
    backbones.save(path, backbones.build("resnet18", 6, COLOUR, 0))
    return str(path)


def test_epochs_are_what_the_budget_buys():
    few = torch.empty(1000, 3, 32, 32, dtype=torch.uint8)
    many = torch.empty(1, 3, 32, 32, dtype=torch.uint8).expand(50_000, 3, 32, 32)
    narrow, wide = ({"scratch": backbones.build("resnet18", width, COLOUR, 0)} for width in (16, 32))
    plan = dataclasses.replace(QUICK, work=1e5, most_epochs=60)
    assert stages.epochs(-1, plan, few, narrow) == 60  # 100, but no more than there may be
    assert stages.epochs(-1, plan, few, wide) == 25  # four times the cost
    assert stages.epochs(-1, plan, few[:, :, :16, :16], wide) == 60
    assert stages.epochs(-1, plan, many, narrow) == stages.FEWEST_EPOCHS
    known = {"imagenet": narrow["scratch"]}
    assert stages.epochs(-1, plan, many, known) == stages.epochs(-1, plan, many, {"patches": None}) == 0
    assert stages.epochs(7, plan, many, narrow) == 7 and stages.epochs(7, plan, many, {"patches": None}) == 0


@pytest.fixture(scope="module")
def stripes() -> data.ImageSet:
    """Return 120 noisy images of four classes, which only differ in the direction of fine stripes."""
    rng, labels = np.random.default_rng(0), np.arange(120) % 4
    y, x = np.mgrid[:16, :16]
    waves = [np.sin(1.6 * part) for part in (x, y, x + y, x - y)]
    images = [128 + 50 * waves[k] + rng.normal(0, 25, (3, 16, 16)) for k in labels]
    images = torch.from_numpy(np.stack(images).clip(0, 255).astype(np.uint8))
    return data.ImageSet(images, labels, None, list("abcd"), [str(i) for i in range(120)])


class Blind(nn.Module):
    """A network that sees the brightness only."""

    num_features = 2

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), x[:, 0].mean((1, 2))], 1)


def describe(folder, stripes, networks, choose, monkeypatch):
    monkeypatch.setattr(stages.patches, "SAMPLES", 2000)
    run = runs.start(folder, start="+".join(networks), backbone="resnet18", width=2, budget="quick", seed=0)
    return run, *stages.features(run, networks, stripes, stripes.images, 0, engine.place(), choose)


def test_the_network_that_explains_the_labels_is_chosen(tmp_path, stripes, monkeypatch):
    """Features of a blind network only disturb; without a choice, both count alike."""
    networks = {"patches": None, "blind": Blind()}
    run, chosen, used = describe(tmp_path / "a", stripes, networks, True, monkeypatch)
    assert used == "patches" and stages.features(run, networks, stripes, None, 0, None, True)[1] == used
    both, used = describe(tmp_path / "b", stripes, networks, False, monkeypatch)[1:]
    assert used == "patches+blind" and both.shape == (120, chosen.shape[1] + 2)
    np.testing.assert_allclose(both[:, :-2], chosen, atol=1e-6)
    for block in (both[:, :-2], both[:, -2:]):
        assert block.var(0).sum() == pytest.approx(1, abs=1e-3)


def test_other_images_are_described_as_those_that_were_audited(tmp_path, stripes, monkeypatch):
    run, features, _ = describe(tmp_path, stripes, {"patches": None}, False, monkeypatch)
    monkeypatch.setattr(stages.patches, "learn", None)  # it is not called again
    again = stages.features_of(run, stripes, stripes.images, engine.place())
    np.testing.assert_allclose(again, features, atol=1e-5)


def test_patches_see_large_images_smaller_and_others_the_original(stripes):
    large = torch.nn.functional.interpolate(stripes.images[:4].float(), scale_factor=4).to(torch.uint8)
    network = stages.patches.Patches(3, 4, 5)
    assert stages.described(network, stripes, large, engine.place()).shape == (4, 20)
    seen = []
    monkey = type(
        "Seen", (stages.starts.Pretrained,), {"forward": lambda self, x: seen.append(x.shape) or x.mean((2, 3))}
    )
    other = stages.starts.load("lite0", 32)
    other.__class__, other.num_features = monkey, 3
    stages.described(other, stripes, None, engine.place())
    assert {shape[1:] for shape in seen} == {(3, 32, 32)} and sum(len(shape) and shape[0] for shape in seen) == 120


def test_flag_by_own_threshold_by_rate_or_by_number():
    labels, probs = np.array([0, 1, 2, 0]), np.array([[0.9, 0.1, 0], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    ours = Suspects(np.array([0.9, 0.5, 0.1, 0.2], np.float32), np.arange(4) == 2, np.array([0, 1, 0, 1]))
    likely = np.array([0.1, 0.2, 0.9, 0.8], np.float32)
    for by, precision, rows in (
        ("own", 0, [2]),
        ("rate", 0, [2, 3]),
        ("0", 0, []),
        ("3", 0, [1, 2, 3]),
        ("own", 0.8, [2, 3]),
    ):
        again = stages.flag(ours, by, precision, 0.5, likely, labels, probs)
        assert list(np.flatnonzero(again.flagged)) == rows
        assert (again.suggested != labels)[again.flagged].all()
    refused("5 labels", call=stages.flag)(ours, "5", 0, 0.5, likely, labels, probs)
