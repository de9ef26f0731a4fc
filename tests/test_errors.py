"""The one-line error and its nearest name."""

import pytest

from ptglab.errors import InputError, one_of


@pytest.mark.parametrize("choices", [["simclr", "vicreg"], ("vicreg", "simclr"), {"simclr": 1}, iter(["a", "simclr"])])
def test_a_valid_name_comes_back(choices):
    assert one_of("method", "simclr", choices) == "simclr"


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        (
            "simlcr",
            ["simclr", "vicreg"],
            "unknown method 'simlcr': did you mean 'simclr'? there are simclr, vicreg",
        ),
        (
            "qqq",
            ["simclr", "vicreg"],
            "unknown method 'qqq': there are simclr, vicreg",
        ),
        (
            "SimCLR",
            [],
            "unknown method 'SimCLR': there are none",
        ),
        (3, ["1", "2"], "unknown method '3': there are 1, 2"),
    ],
)
def test_an_unknown_name_is_answered_in_one_line(name, choices, message):
    with pytest.raises(InputError) as caught:
        one_of("method", name, choices)
    assert str(caught.value) == message


def test_input_error_is_a_value_error():
    """So that a notebook user's `except ValueError` catches it."""
    with pytest.raises(ValueError, match="unknown"):
        one_of("method", "x", ["y"])


def test_what_cannot_be_printed_is_escaped():
    """A message stays one line, and does nothing to a terminal."""
    name = "a\nb\x1b[31m\x1e\u2028\x85\udcff猫"
    with pytest.raises(InputError) as caught:
        one_of("thing", name, ["cat"])
    assert str(caught.value) == r"unknown thing 'a\nb\x1b[31m\x1e\u2028\x85\xff猫': there are cat"
