"""The HTML and the widgets that the review and the explorer share.

All HTML comes from one template, which escapes whatever data brings. ipywidgets is imported where it is used. Every
part that can be seen has a class that begins with `ptglab-`.
"""

import base64
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2

from ptglab.audit import exports
from ptglab.data import ImageSet
from ptglab.lab import live

STATIC = Path(__file__).parent / "static"
CSS = (STATIC / "review.css").read_text(encoding="utf-8")
PARTS = jinja2.Environment(
    loader=jinja2.FileSystemLoader(STATIC), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
).get_template("parts.html.j2").module  # fmt: skip


def fill(part: str, **values) -> str:
    """Return the HTML of the macro `part` of the template, filled with `values`."""
    return str(getattr(PARTS, part)(**values))


def cards(images: ImageSet, rows: Iterable[int], side: int, alt: Callable, text: Callable) -> list[dict]:
    """Return what is shown of each row: row, picture (a data address), alt and text, which are made from the row.

    side: of the pictures, at most, in pixels. The style sheet enlarges a PNG without blur.
    """
    shown = []
    for row, picture in zip(rows, exports.thumbnails(images, rows, side), strict=True):
        kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
        source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        shown.append({"row": int(row), "picture": source, "alt": alt(row), "text": text(row)})
    return shown


def still(summary: str, heading: str, gallery: str, drawn: str = "") -> str:
    """Return a page without widgets: two texts, and below them the HTML of figures and of a gallery."""
    return fill("still", style=CSS, summary=summary, drawn=drawn, heading=heading, gallery=gallery)


def bundle(view, **kwargs) -> dict:
    """Return what IPython displays of `view`: its widgets in JupyterLab, and its still page for any other reader."""
    page = {"text/plain": repr(view), "text/html": view.still()}
    return (view.widgets.box._repr_mimebundle_(**kwargs) if live.interactive() else {}) | page


def widget(kind: str, name: str, *args, act: Callable | None = None, **traits):
    """Return a widget of ipywidgets: a `kind`, as "HTML" or "HBox", with the class `ptglab-NAME`.

    A click on a button calls `act()`, and a new value of any other widget `act(value)`.
    """
    import ipywidgets

    made = getattr(ipywidgets, kind)(*args, **traits).add_class(f"ptglab-{name}")
    if act and kind == "Button":
        made.on_click(lambda _: act())
    elif act:
        made.observe(lambda change: act(change["new"]), "value")
    return made
