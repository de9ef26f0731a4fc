"""Watching a run in JupyterLab: curves that grow, and a button that stops it; elsewhere a sober line of text."""

import os
import sys


def interactive() -> bool:
    """Return whether widgets would be seen: JupyterLab, and who does as it does, names the cell that it executes.

    papermill, nbval and scripts do not. A widget that calls is seen. PTGLAB_STATIC=1 in the environment says no.
    """
    if os.environ.get("PTGLAB_STATIC") or "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    asked = kernel.get_parent("shell") if kernel is not None else {}
    return "cellId" in asked.get("metadata", {}) or asked.get("header", {}).get("msg_type", "").startswith("comm_")
