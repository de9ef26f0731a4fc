"""Stopping: signals end a block in one line, and mean afterwards what they did before."""

import multiprocessing
import signal
import threading

import pytest

from ptglab import stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_and_is_put_back(number):
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(stopping.Stopped, match=f"^{stopping.LINE}$") as caught, stopping.stoppable():
        signal.raise_signal(number)
    assert caught.value._render_traceback_() == [stopping.LINE] and caught.value.__suppress_context__
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    signal.signal(signal.SIGINT, ignored)


def test_other_ends_of_a_block_are_left_alone():
    with pytest.raises(ValueError, match="other"), stopping.stoppable():
        raise ValueError("other")
    with stopping.stoppable():
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def work():
        with stopping.stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def caught(number: int, nohup: bool, message) -> None:
    """Send oneself a signal, and again while ending; say what came of it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does to background jobs
    stopping.catch()
    try:
        signal.raise_signal(number)
        message.send("went on")
    except KeyboardInterrupt:
        signal.raise_signal(number)
        message.send("stopped once")


@pytest.mark.parametrize(
    ("number", "nohup", "said"),
    [(signal.SIGINT, False, "stopped once"), (signal.SIGTERM, False, "stopped once"),
     (signal.SIGHUP, False, "stopped once"), (signal.SIGHUP, True, "went on")],
)  # fmt: skip
def test_a_command_catches_them_once(number, nohup, said):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=caught, args=(number, nohup, there))
    process.start()
    assert here.recv() == said
    process.join()
    assert process.exitcode == 0
