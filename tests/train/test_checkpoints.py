"""Checkpoints: resumed exactly, the one before kept until the new one is whole, damage seen and said."""

import os

import pytest
import torch
from expected import refused
from safetensors.torch import save_file
from torch import nn

from ptglab import files
from ptglab.errors import InputError
from ptglab.train import checkpoints, optim


def network(seed, inner=4):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(3, inner), nn.BatchNorm1d(inner), nn.ReLU())
    return dict(backbone=backbone, head=nn.Linear(inner, 2))


OPTIMIZERS = {
    "sgd": lambda ms: torch.optim.SGD(optim.parameter_groups(ms, 0.1, 1e-3), momentum=0.9),
    "plain sgd": lambda ms: torch.optim.SGD(optim.parameter_groups(ms, 0.1, 1e-3)),
    "lars": lambda ms: optim.LARS(optim.parameter_groups(ms, 0.1, 1e-3), lr=0.1),
    "adamw": lambda ms: torch.optim.AdamW(optim.parameter_groups(ms, 0.1, 1e-3)),
}


def train(modules, optimizer, epochs):
    """One step an epoch, on a batch that only the epoch decides."""
    for epoch in epochs:
        rng = torch.Generator().manual_seed(epoch)
        x, y = torch.randn(8, 3, generator=rng), torch.randint(0, 2, (8,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(modules["head"](modules["backbone"](x)), y).backward()
        optimizer.step()


def state(modules, optimizer):
    tensors = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    moments = optimizer.state_dict()["state"]
    return tensors | {f"{i}.{k}": v for i, values in moments.items() for k, v in values.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype and torch.equal(tensor, b[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    path = tmp_path / "checkpoint.safetensors"
    modules = network(seed=0)
    optimizer = OPTIMIZERS[name](modules.values())
    train(modules, optimizer, range(3))
    checkpoints.save(path, 3, optimizer, **modules)
    saved = {key: tensor.clone() for key, tensor in state(modules, optimizer).items()}
    train(modules, optimizer, range(3, 6))

    resumed = network(seed=1)
    other = OPTIMIZERS[name](resumed.values())
    assert checkpoints.load(path, other, **resumed) == 3
    assert_same(state(resumed, other), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    train(resumed, other, range(3, 6))
    assert_same(state(resumed, other), state(modules, optimizer))
    assert any((saved[key] != tensor).any() for key, tensor in state(resumed, other).items())


def test_without_a_checkpoint_nothing_is_done(tmp_path):
    modules = network(seed=0)
    optimizer = OPTIMIZERS["sgd"](modules.values())
    before = {key: tensor.clone() for key, tensor in state(modules, optimizer).items()}
    checkpoints.save(None, 1, optimizer, **modules)
    assert checkpoints.load(None, optimizer, **modules) == 0
    assert checkpoints.load(tmp_path / "none", optimizer, **modules) == 0
    assert_same(state(modules, optimizer), before)


@pytest.fixture
def checkpoint(tmp_path):
    modules = network(seed=0)
    optimizer = OPTIMIZERS["sgd"](modules.values())
    train(modules, optimizer, range(1))
    checkpoints.save(tmp_path / "c.safetensors", 1, optimizer, **modules)
    return tmp_path / "c.safetensors"


def resume(path, modules):
    return checkpoints.load(path, OPTIMIZERS["sgd"](modules.values()), **modules)


@pytest.fixture
def two(tmp_path):
    """Return the path of a checkpoint after epoch 2, beside which the one after epoch 1 is kept."""
    modules = network(seed=0)
    optimizer = OPTIMIZERS["sgd"](modules.values())
    for epoch in (1, 2):
        train(modules, optimizer, range(epoch - 1, epoch))
        checkpoints.save(tmp_path / "c.safetensors", epoch, optimizer, **modules)
    return tmp_path / "c.safetensors"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "a bit":
        content[-9] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: int(how * len(content)) if isinstance(how, float) else how])


DAMAGES = pytest.mark.parametrize(
    "how", [0, 5, 0.5, -1, "a bit"], ids=["empty", "in the length", "half", "all but one byte", "a bit"]
)


@DAMAGES
def test_a_damaged_checkpoint_gives_way_to_the_one_before(two, how, capsys):
    assert sorted(p.name for p in two.parent.iterdir()) == ["c.previous.safetensors", "c.safetensors"]
    damage(two, how)
    modules = network(seed=1)
    assert resume(two, modules) == 1
    expected = network(seed=0)
    train(expected, OPTIMIZERS["sgd"](expected.values()), range(1))
    optimizer = OPTIMIZERS["sgd"](modules.values())
    assert_same(state(modules, optimizer), state(expected, optimizer))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{two} is damaged (") and line.endswith("going on from the one before it, after epoch 1")
    checkpoints.save(two, 2, optimizer, **modules)  # what is damaged does not take the place of what is whole
    assert resume(two, network(seed=1)) == 2 and resume(checkpoints.previous(two), network(seed=1)) == 1


@DAMAGES
def test_two_damaged_checkpoints_are_said_and_the_stage_starts_anew(two, how, capsys):
    damage(two, how)
    damage(checkpoints.previous(two), how)
    assert resume(two, modules := network(seed=1)) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert str(two) in line and str(checkpoints.previous(two)) in line and line.endswith("this stage starts anew")
    assert torch.equal(modules["head"].weight, network(seed=1)["head"].weight)
    assert list(two.parent.iterdir()) == []


def test_a_kill_between_two_checkpoints_costs_none(two, monkeypatch, capsys):
    """The first is put aside, then the second written: if only that remains to be done, nothing is said."""
    modules = network(seed=2)
    monkeypatch.setattr(files, "os", None)  # from there on the process is gone
    with pytest.raises(AttributeError):
        checkpoints.save(two, 3, OPTIMIZERS["sgd"](modules.values()), **modules)
    assert [p.name for p in two.parent.iterdir()] == ["c.previous.safetensors"]
    assert resume(two, network(seed=1)) == 2
    assert capsys.readouterr().err == ""


def test_a_full_disk_leaves_the_last_whole_checkpoint(two, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    modules = network(seed=2)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=f"cannot write {two.parent}: the disk is full; make room and run again"):
        checkpoints.save(two, 3, OPTIMIZERS["sgd"](modules.values()), **modules)
    assert [p.name for p in two.parent.iterdir()] == ["c.previous.safetensors"]
    assert resume(two, network(seed=1)) == 2


@pytest.mark.parametrize(
    "other",
    [
        network(0, inner=5),
        {"backbone": network(0)["backbone"], "projector": nn.Linear(4, 2)},
        {"backbone": network(0)["backbone"][:1], "head": nn.Linear(4, 2)},
        {"backbone": network(0)["backbone"], "head": nn.Linear(4, 2, bias=False)},
    ],
    ids=["width", "module", "fewer layers", "no bias"],
)
def test_the_checkpoint_of_another_network_is_refused(checkpoint, other):
    refused(f"{checkpoint} cannot be resumed", call=resume)(checkpoint, other)


# ---- tensors on disk

STATE = {
    "weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
}


def test_both_are_dropped(two):
    for _ in range(2):
        checkpoints.drop(two)
    assert list(two.parent.iterdir()) == []


@pytest.fixture
def model(tmp_path):
    checkpoints.write_tensors(tmp_path / "model.safetensors", STATE, {"epoch": "3"})
    return tmp_path / "model.safetensors"


def test_tensors_come_back_to_the_bit(model):
    back, about = checkpoints.read_tensors(model)
    assert about == {"epoch": "3"} and back.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))


def test_any_bit_that_flips_and_any_length_but_the_whole_is_seen(model):
    """Every byte of the file in turn: the length, the names, the texts, the tensors."""
    whole = model.read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        for damaged in (flipped, whole[:at]):
            model.write_bytes(damaged)
            with pytest.raises(checkpoints.Damaged):
                checkpoints.read_tensors(model)


def test_what_is_no_file_of_tensors_and_what_has_no_checksum(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoints.read_tensors(tmp_path / "none")
    with pytest.raises(checkpoints.Damaged):
        checkpoints.read_tensors(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"epoch": "1"})
    back, about = checkpoints.read_tensors(tmp_path / "old.safetensors")
    assert back["a"].tolist() == [1, 1] and about == {"epoch": "1"}
