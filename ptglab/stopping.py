"""Stopping: Ctrl-C, SIGTERM (a cluster's warning) and a closed terminal end a run with one line; it can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ptglab.files import GO_ON

LINE = f"stopped; {GO_ON}"
STATUS = 130  # the exit status that a shell expects of a command ended by Ctrl-C
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A run was stopped from outside; what it had written is whole."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in place of a traceback."""
        return [LINE]


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped when SIGINT or SIGTERM arrives inside the block, in the main thread, where signals arrive."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(LINE) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def catch() -> None:
    """Make the first of SIGNALS raise KeyboardInterrupt; later ones are ignored while the process ends.

    SIGINT, which a shell ignores for background jobs, counts again; SIGHUP stays ignored under nohup.
    """

    def stop(number, frame) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
