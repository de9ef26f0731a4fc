"""The one error a person can cause, and the sentence that names the nearest valid name."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """What was asked for cannot be done; the message is one line that names the thing and the mend."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in the place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def shown(text: object) -> str:
    """Return `text` on one line, for a message: what cannot be printed is escaped, as in `\\n`."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1].replace("udc", "x") for c in str(text))


def one_of(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return `name` if it is one of `choices`.

    Raises InputError naming the `kind`, the nearest choice and all of them otherwise.
    """
    choices = list(choices)
    if name in choices:
        return name
    near = get_close_matches(str(name), choices, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise InputError(f"unknown {kind} '{shown(name)}': {hint}there are {', '.join(choices) or 'none'}")
