"""Watching a run in JupyterLab: curves that grow, and a button that stops it; elsewhere a sober line of text."""

import _thread
import base64
import html
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from tqdm import tqdm

BETWEEN = 0.5  # seconds between two drawings at least, and 8 times as long as one of them takes
NO_CURVES = {"epoch", "seconds", "fold", "learning_rate", "images_per_second"}


def interactive() -> bool:
    """Return whether widgets would be seen: JupyterLab, and who does as it does, names the cell that it executes.

    papermill, nbval and scripts do not. A widget that calls is seen. PTGLAB_STATIC=1 in the environment says no.
    """
    if os.environ.get("PTGLAB_STATIC") or "IPython" not in sys.modules or find_spec("ipywidgets") is None:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    asked = kernel.get_parent("shell") if kernel is not None else {}
    return "cellId" in asked.get("metadata", {}) or asked.get("header", {}).get("msg_type", "").startswith("comm_")


@contextmanager
def watch(title: str, epochs: int, before: Sequence[dict] = ()) -> Iterator[Callable[[dict], None]]:
    """Show a run of `epochs` epochs for as long as the block lasts: it calls what it is given with every new record.

    before: the records of an earlier part of the same run. In JupyterLab that is a bar, growing curves of everything
    that a record holds, and a button that does what the kernel's interrupt does: raise KeyboardInterrupt in the main
    thread. Elsewhere it is a progress bar of text.
    """
    if interactive():
        with _panel(title, epochs, list(before)) as show:
            yield show
    else:
        with tqdm(total=epochs, desc=title, unit=" epochs", mininterval=1) as bar:
            yield lambda record: bar.update(record["epoch"] - bar.n)


@contextmanager
def _panel(title: str, epochs: int, records: list[dict]) -> Iterator[Callable[[dict], None]]:
    """Show bar, button and curves. A click arrives while the cell runs: in a subshell, a thread of the kernel's own."""
    import ipywidgets
    from IPython.display import HTML, display

    bar = ipywidgets.IntProgress(value=0, min=0, max=epochs, layout={"width": "14em"})
    line = ipywidgets.Label(f"{title}: the first epoch")
    button = ipywidgets.Button(description="Stop", icon="stop", tooltip="Stop here, as interrupting the kernel does. "
                               "The last whole epoch is kept; run the cell again to go on from it.")  # fmt: skip
    button.add_class("ptglab-stop")
    display(ipywidgets.HBox([button, bar, line]).add_class("ptglab-live"))
    canvas = display(HTML(""), display_id=True)
    began, new, due = time.monotonic(), 0, 0.0

    def stop(_) -> None:
        if not button.disabled:
            button.disabled, line.value = True, f"{title}: stopping"
            _thread.interrupt_main()

    def draw() -> None:
        nonlocal due
        start = time.monotonic()
        canvas.update(HTML(picture(title, epochs, records)))
        due = time.monotonic() + max(BETWEEN, 8 * (time.monotonic() - start))

    def show(record: dict) -> None:
        nonlocal new
        new += 1
        records[:] = [r for r in records if r["epoch"] < record["epoch"]] + [record]  # one may be run again
        if time.monotonic() < due and record["epoch"] < epochs:
            return
        left = (epochs - record["epoch"]) * (time.monotonic() - began) / new
        bar.value, line.value = record["epoch"], f"{described(title, epochs, record)}; about {left:.0f} s left"
        draw()

    button.on_click(stop)
    # ipykernel 7.4 sends what answers a widget to where it was last changed: here the main shell, busy with this cell.
    vars(button.comm).pop("_reply_subshell_id", None)
    try:
        yield show
    finally:
        stopped, button.disabled, button.layout.display = button.disabled, True, "none"
        bar.bar_style = "warning" if stopped or bar.value < epochs else "success"
        if records:
            line.value = described(title, epochs, records[-1]) + ("; stopped" if bar.value < epochs else "")
            draw()


def described(title: str, epochs: int, record: dict) -> str:
    """Return a record in words: "pre-train simclr: epoch 3 of 40, loss 1.234, knn accuracy 81.2 %"."""
    words = [f"{title}: epoch {record['epoch']} of {epochs}"]
    for name in (name for name in record if name not in NO_CURVES):
        value = f"{100 * record[name]:.1f} %" if _is_share(name) else f"{record[name]:.4g}"
        words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(words)


def picture(title: str, epochs: int, records: Sequence[dict]) -> str:
    """Return the curves of `records` as HTML, an image with a text for who cannot see it: losses left, shares right."""
    from matplotlib.figure import Figure

    from ptglab.lab import figures

    names = dict.fromkeys(name for record in records for name in record if name not in NO_CURVES)
    panels = [[n for n in names if _is_share(n) == shares] for shares in (False, True)]
    panels = [panel for panel in panels if panel]
    drawn = Figure(figsize=(4.8 * len(panels), 2.6), layout="constrained")
    for ax, panel in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        series = {}
        for name in panel:
            points = [(r["epoch"], r[name]) for r in records if r.get(name, math.nan) == r.get(name)]
            series[name.replace("_", " ")] = tuple(zip(*points, strict=True))
        figures.lines(ax, series, "epoch", "%" if _is_share(panel[0]) else "", percent=_is_share(panel[0]))
        ax.set_xlim(0, epochs)
    return page(drawn, f"Curves: {described(title, epochs, records[-1])}")


def page(figure, alt: str) -> str:
    """Return a matplotlib figure as HTML, an image with the text `alt` for who cannot see it."""
    figure.savefig(stream := io.BytesIO(), format="png", dpi=110)
    data, text = base64.b64encode(stream.getvalue()).decode(), html.escape(alt)
    return f'<img class="ptglab-curves" alt="{text}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def _is_share(name: str) -> bool:
    return "accuracy" in name
