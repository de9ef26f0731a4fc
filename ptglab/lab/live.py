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
    if not interactive():
        with tqdm(total=epochs, desc=title, unit=" epochs", mininterval=1) as bar:
            yield lambda record: bar.update(record["epoch"] - bar.n)
        return
    import ipywidgets
    from comm import get_comm_manager
    from comm.base_comm import BaseComm
    from IPython.display import HTML, display
    from tqdm import notebook

    class Heard(BaseComm):
        """A widget's comm whose messages arrive where they were sent to: in a subshell, another thread of the kernel.

        ipykernel (7.4) delivers those of its own comms where they last sent from: here the main shell, which is busy.
        """

        def publish_msg(self, *args, **kwargs):
            own.publish_msg(*args, **kwargs)

    button = ipywidgets.Button(description="Stop", icon="stop", tooltip="Stop here, as interrupting the kernel does. "
                               "The last whole epoch is kept; run the cell again to go on from it.")  # fmt: skip
    own = button.comm
    button.comm = Heard(comm_id=own.comm_id, primary=False)
    get_comm_manager().register_comm(button.comm)
    records = list(before)
    bar = notebook.tqdm(total=epochs, initial=len(records), desc=title, unit=" epochs", display=False)
    display(ipywidgets.HBox([button, bar.container]))
    canvas, due = display(HTML(""), display_id=True), 0.0

    def stop(_) -> None:
        if not button.disabled:
            button.disabled = True
            signal.raise_signal(signal.SIGINT)

    def show(record: dict) -> None:
        nonlocal due
        records[:] = [r for r in records if r["epoch"] < record["epoch"]] + [record]  # an epoch may be repeated
        bar.set_postfix_str(described(record), refresh=False)
        bar.update(record["epoch"] - bar.n)
        if (start := time.monotonic()) >= due:
            canvas.update(HTML(picture(title, epochs, records)))
            due = time.monotonic() + max(BETWEEN, 8 * (time.monotonic() - start))

    button.on_click(stop)
    try:
        yield show
    finally:
        button.disabled, button.layout.display = True, "none"
        bar.close()
        if records:
            canvas.update(HTML(picture(title, epochs, records)))


def described(record: dict) -> str:
    """Return what was measured in an epoch in words: "loss 1.234, knn accuracy 81.2 %"."""
    shown = {name.replace("_", " "): value for name, value in record.items() if name not in NO_CURVES}
    return ", ".join(f"{n} {100 * v:.1f} %" if "accuracy" in n else f"{n} {v:.4g}" for n, v in shown.items())


def picture(title: str, epochs: int, records: Sequence[dict]) -> str:
    """Return the curves of `records` as an HTML image with a text alternative: losses left, accuracies right."""
    from matplotlib.figure import Figure

    from ptglab.lab import figures

    names = dict.fromkeys(name for record in records for name in record if name not in NO_CURVES)
    panels = [panel for shares in (False, True) if (panel := [n for n in names if ("accuracy" in n) == shares])]
    figure = Figure(figsize=(4.8 * len(panels), 2.6), layout="constrained")
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        series, shares = {}, "accuracy" in panel[0]
        for name in panel:
            points = [(r["epoch"], r[name]) for r in records if r.get(name, math.nan) == r.get(name)]
            series[name.replace("_", " ")] = tuple(zip(*points, strict=True))
        figures.lines(ax, series, "epoch", "%" if shares else "", percent=shares)
        ax.set_xlim(0, epochs)
    last = records[-1]
    return page(figure, f"Curves: {title}: epoch {last['epoch']} of {epochs}, {described(last)}")


def page(figure, alt: str) -> str:
    """Return a matplotlib figure as an HTML image with the alternative text `alt`."""
    figure.savefig(stream := io.BytesIO(), format="png", dpi=110)
    data, text = base64.b64encode(stream.getvalue()).decode(), html.escape(alt)
    return f'<img class="ptglab-curves" alt="{text}" style="max-width: 100%" src="data:image/png;base64,{data}">'
