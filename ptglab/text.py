"""Text from data, made safe to show: in a terminal, in HTML, in a spreadsheet."""

import re

# Control characters, line ends, marks that reverse the reading order, and bytes that are not UTF-8
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What a spreadsheet takes for a formula, also behind the apostrophes of `escape_formula` (OWASP, "CSV Injection")
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
# The same behind what parts cells where commas do not: spreadsheets in many countries split lines at semicolons
INNER = re.compile("([;\t])(?='*[=+\\-@\uff1d\uff0b\uff0d\uff20])")


def printable(text: object) -> str:
    """Return `text` as one line of valid UTF-8; what cannot be shown becomes an escape such as `\\n` or `\\xff`."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1].replace("udc", "x"), str(text))


def escape_formula(text: str) -> str:
    """Return `text` with an apostrophe before whatever a spreadsheet would run as a formula."""
    text = INNER.sub(r"\1'", text)
    return f"'{text}" if FORMULA.match(text) else text


def unescape_formula(text: str) -> str:
    """Return `text` without the apostrophes that `escape_formula` put in."""
    text = re.sub(f"{INNER.pattern}'", r"\1", text)
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text
