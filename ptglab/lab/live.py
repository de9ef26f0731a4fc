"""Watching a run in JupyterLab: curves that grow, and a button that stops it; elsewhere a plain progress bar."""

import base64
import html
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from tqdm import tqdm

BETWEEN = 0.5  # seconds between two drawings at least, and 8 times as long as one of them takes
NO_CURVES = {"epoch", "seconds", "fold", "learning_rate", "images_per_second"}


def interactive() -> bool:
    """Return whether widgets would be seen: JupyterLab, unlike papermill, nbval and scripts, names the cells it runs.

    A message from a widget counts as well. PTGLAB_STATIC=1 in the environment says no.
    """
    if os.environ.get("PTGLAB_STATIC") or "IPython" not in sys.modules or find_spec("ipywidgets") is None:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    asked = kernel.get_parent("shell") if kernel is not None else {}
    return "cellId" in asked.get("metadata", {}) or asked.get("header", {}).get("msg_type", "").startswith("comm_")


@contextmanager
def watch(title: str, epochs: int, before: Sequence[dict] = ()) -> Iterator[Callable[[dict], None]]:
    """Show a run of `epochs` epochs while the block lasts; yield a function that is called with every new record.

    before: the records of an earlier part of the same run. JupyterLab shows a bar, growing curves of everything that a
    record holds, and a button that interrupts the kernel. Elsewhere there is a progress bar of text.
    """
    if interactive():
        with _panel(title, epochs, list(before)) as show:
            yield show
    else:
        with tqdm(total=epochs, desc=title, unit=" epochs", mininterval=1) as bar:
            yield lambda record: bar.update(record["epoch"] - bar.n)


@contextmanager
def _panel(title: str, epochs: int, records: list[dict]) -> Iterator[Callable[[dict], None]]:
    """Show bar, button and curves. A click arrives while the cell runs: in a subshell, another thread of the kernel."""
    import ipywidgets
    from comm import get_comm_manager
    from comm.base_comm import BaseComm
    from IPython.display import HTML, display

    class Heard(BaseComm):
        """A widget's comm whose messages arrive in the subshell that they were sent to.

        ipykernel (7.4) delivers those of its own comms where they last sent from: here the main shell, which is busy.
        """

        def publish_msg(self, *args, **kwargs):
            own.publish_msg(*args, **kwargs)

    bar = ipywidgets.IntProgress(value=0, min=0, max=epochs, layout={"width": "14em"})
    line = ipywidgets.Label(f"{title}: the first epoch")
    button = ipywidgets.Button(description="Stop", icon="stop", tooltip="Stop here, as interrupting the kernel does. "
                               "The last whole epoch is kept; run the cell again to go on from it.")  # fmt: skip
    own = button.comm
    button.comm = Heard(comm_id=own.comm_id, primary=False)
    get_comm_manager().register_comm(button.comm)
    display(ipywidgets.HBox([button.add_class("ptglab-stop"), bar, line]).add_class("ptglab-live"))
    canvas = display(HTML(""), display_id=True)
    began, due, known = time.monotonic(), 0.0, len(records)

    def stop(_) -> None:
        if not button.disabled:
            button.disabled, line.value = True, f"{title}: stopping"
            signal.raise_signal(signal.SIGINT)

    def draw() -> None:
        nonlocal due
        start = time.monotonic()
        canvas.update(HTML(picture(title, epochs, records)))
        due = time.monotonic() + max(BETWEEN, 8 * (time.monotonic() - start))

    def show(record: dict) -> None:
        records[:] = [r for r in records if r["epoch"] < record["epoch"]] + [record]  # an epoch may be repeated
        if time.monotonic() >= due or record["epoch"] >= epochs:
            left = (epochs - len(records)) * (time.monotonic() - began) / max(1, len(records) - known)
            bar.value, line.value = record["epoch"], f"{described(title, epochs, record)}; about {left:.0f} s left"
            draw()

    button.on_click(stop)
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
        value = f"{100 * record[name]:.1f} %" if "accuracy" in name else f"{record[name]:.4g}"
        words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(words)


def picture(title: str, epochs: int, records: Sequence[dict]) -> str:
    """Return the curves of `records` as an HTML image with a text alternative: losses left, accuracies right."""
    from matplotlib.figure import Figure

    from ptglab.lab import figures

    names = dict.fromkeys(name for record in records for name in record if name not in NO_CURVES)
    panels = [[n for n in names if ("accuracy" in n) == shares] for shares in (False, True)]
    panels = [panel for panel in panels if panel]
    drawn = Figure(figsize=(4.8 * len(panels), 2.6), layout="constrained")
    for ax, panel in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        series, shares = {}, "accuracy" in panel[0]
        for name in panel:
            points = [(r["epoch"], r[name]) for r in records if r.get(name, math.nan) == r.get(name)]
            series[name.replace("_", " ")] = tuple(zip(*points, strict=True))
        figures.lines(ax, series, "epoch", "%" if shares else "", percent=shares)
        ax.set_xlim(0, epochs)
    return page(drawn, f"Curves: {described(title, epochs, records[-1])}")


def page(figure, alt: str) -> str:
    """Return a matplotlib figure as an HTML image with the alternative text `alt`."""
    figure.savefig(stream := io.BytesIO(), format="png", dpi=110)
    data, text = base64.b64encode(stream.getvalue()).decode(), html.escape(alt)
    return f'<img class="ptglab-curves" alt="{text}" style="max-width: 100%" src="data:image/png;base64,{data}">'
