"""Stopping: signals end a block in one line, and mean afterwards what they did before."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ptglab import stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_and_is_put_back(number):
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(stopping.Stopped, match=f"^{stopping.LINE}$") as caught, stopping.stoppable():
        os.kill(os.getpid(), number)
        time.sleep(5)
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


CATCHES = """
import os, signal, sys, time
if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does to background jobs
from ptglab import stopping
stopping.catch()
number = int(sys.argv[1])
try:
    os.kill(os.getpid(), number)
    time.sleep(0.2)
    print("went on")
except KeyboardInterrupt:
    os.kill(os.getpid(), number)  # again, while it is ending
    time.sleep(0.2)
    print("stopped once")
"""


@pytest.mark.parametrize(
    ("number", "how", "said"),
    [(signal.SIGINT, "", "stopped once"), (signal.SIGTERM, "", "stopped once"), (signal.SIGHUP, "", "stopped once"),
     (signal.SIGHUP, "nohup", "went on")],
)  # fmt: skip
def test_a_command_catches_them_once(number, how, said):
    command = [sys.executable, "-c", CATCHES, str(int(number)), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == said and not done.stderr and done.returncode == 0
