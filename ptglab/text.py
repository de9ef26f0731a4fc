"""Text from data, made safe to show: in a terminal, in HTML, in a spreadsheet."""

import re

# Control characters, line ends, marks that reverse the reading order, and bytes that are not UTF-8
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What a spreadsheet takes for a formula, also behind the apostrophes of `escape_formula` (OWASP, "CSV Injection")
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def printable(text: object) -> str:
    """Return `text` as one line of valid UTF-8; what cannot be shown becomes an escape such as `\\n` or `\\xff`."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1].replace("udc", "x"), str(text))


def escape_formula(text: str) -> str:
    """Return `text` with a leading apostrophe if a spreadsheet would run it as a formula."""
    return f"'{text}" if FORMULA.match(text) else text


def unescape_formula(text: str) -> str:
    """Return `text` without the apostrophe that `escape_formula` put in front of it."""
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text
