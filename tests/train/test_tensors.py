"""Tensors on disk: they come back as they were, and a file that was cut or changed is known for it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ptglab.train import tensors

STATE = {
    "weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path):
    tensors.save(tmp_path / "model.safetensors", STATE, {"epoch": "3"})
    return tmp_path / "model.safetensors"


def test_tensors_come_back_to_the_bit(path):
    back, about = tensors.load(path)
    assert about == {"epoch": "3"} and back.keys() == STATE.keys() == load_file(path).keys()
    for name, tensor in STATE.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_any_bit_that_flips_is_seen(path):
    """Every byte of the file in turn: the length, the names, the texts, the tensors."""
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        with pytest.raises(tensors.Damaged) as caught:
            tensors.load(path)
        assert "\n" not in str(caught.value)


def test_any_length_but_the_whole_is_seen(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(tensors.Damaged):
            tensors.load(path)


def test_what_is_no_file_of_tensors(tmp_path):
    with pytest.raises(FileNotFoundError):
        tensors.load(tmp_path / "none")
    with pytest.raises(tensors.Damaged):
        tensors.load(tmp_path)


def test_a_file_without_a_checksum_is_taken_as_it_is(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"epoch": "1"})
    back, about = tensors.load(tmp_path / "old.safetensors")
    np.testing.assert_array_equal(back["a"], [1, 1])
    assert about == {"epoch": "1"}
    save_file({"a": torch.ones(2)}, tmp_path / "bare.safetensors")
    assert tensors.load(tmp_path / "bare.safetensors")[1] == {}
