"""The one error that a person can cause, and the refusal of a name that suggests the nearest valid one."""

from collections.abc import Iterable
from difflib import get_close_matches

from ptglab.text import printable

SYNONYMS = {"symmetric": "uniform", "symmetrical": "uniform"}  # what others call what we have under another name


class InputError(ValueError):
    """What was asked for cannot be done. The message is one line that names the thing and how to mend it."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def one_of(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return `name` if it is one of `choices`.

    Raises InputError otherwise, naming the `kind`, the nearest choice and all the choices.
    """
    choices = list(choices)
    if name in choices:
        return name
    nearest = [each for each in [SYNONYMS.get(name)] if each in choices] or get_close_matches(str(name), choices, n=1)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    raise InputError(f"unknown {kind} '{printable(name)}': {hint}there are {', '.join(choices) or 'none'}")
