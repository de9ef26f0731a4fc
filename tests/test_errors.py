"""The one-line error and its nearest name."""

import pytest
from expected import refused

from ptglab.errors import InputError, one_of


@pytest.mark.parametrize("choices", [["simclr", "vicreg"], {"simclr": 1}, iter(["a", "simclr"])])
def test_a_valid_name_comes_back(choices):
    assert one_of("method", "simclr", choices) == "simclr"


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("simlcr", ["simclr", "vicreg"], ["'simlcr'", "did you mean 'simclr'?", "there are simclr, vicreg"]),
        ("qqq", ["simclr", "vicreg"], ["unknown method 'qqq': there are simclr, vicreg"]),
        ("SimCLR", [], ["there are none"]),
        ("symmetric", ["asymmetric", "uniform"], ["did you mean 'uniform'?"]),
        ("symmetric", ["asymmetric", "knn"], ["did you mean 'asymmetric'?"]),
        (3, ["1", "2"], ["unknown method '3'"]),
        ("a\nb\x1b[31m\x1e\u2028\x85\udcff猫", ["cat"], [r"'a\nb\x1b[31m\x1e\u2028\x85\xff猫'"]),
    ],
)
def test_an_unknown_name_is_answered_in_one_line(name, choices, words):
    """It does nothing to a terminal; a notebook user's `except ValueError` catches it."""
    refused(*words, call=one_of)("method", name, choices)
    assert issubclass(InputError, ValueError)
