"""Stopping: Ctrl-C, SIGTERM (a cluster's warning) and a closed terminal end a run in one line, to be gone on with."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ptglab.files import GO_ON

LINE = f"stopped; {GO_ON}"
STATUS = 130  # what a shell expects of a command that Ctrl-C has ended
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A run was stopped from outside; what it had written is whole."""

    def __init__(self):
        super().__init__(LINE)

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in the place of a traceback."""
        return [LINE]


@contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGINT and SIGTERM end the block by Stopped; afterwards they mean what they did before.

    Outside the main thread, where signals do not arrive, SIGTERM is left as it is.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def catch() -> None:
    """Have every one of SIGNALS raise KeyboardInterrupt in this process, once: then it is busy with ending.

    A shell starts background jobs with SIGINT ignored, which is undone; SIGHUP stays ignored, as by nohup.
    """
    for number in SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number, frame) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt
