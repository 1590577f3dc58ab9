"""Signals are wishes while a run listens, and as before when it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from minitron_megatron.training.stop import SIGNALS, StopRequest, deferred


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish_and_so_is_the_next_one_while_the_run_saves(number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.listening():
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    os.kill(os.getpid(), number)  # pytest would be gone


def test_a_run_that_nobody_asked_leaves_the_handlers_as_they_were() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as below slurm/common.sh
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_installed() -> None:
    """Python would raise."""
    before, raised = signal.getsignal(signal.SIGTERM), []

    def listen() -> None:
        try:
            with StopRequest().listening():
                raised.append(signal.getsignal(signal.SIGTERM) is before)
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert raised == [True]


def test_what_is_started_while_signals_are_deferred_does_not_die_of_them_and_this_process_hears_of_its_own_afterwards() -> None:
    """A checkpoint's helper that has just been started: its handlers are the system's own."""
    stop, waits = StopRequest(), "import sys; print(1, flush=True); sys.stdin.read()"
    with stop.listening():
        with deferred():
            child = subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert child.stdout and child.stdout.readline() == b"1\n"
            for number in SIGNALS:
                child.send_signal(number)
                os.kill(os.getpid(), number)
            assert not stop.asked or len(threading.enumerate()) > 1  # another thread may have heard of it
        assert stop.asked
        child.communicate()
    assert child.returncode == 0


def test_the_helper_that_python_starts_for_checkpoints_outlives_the_wish() -> None:
    """In a Python of its own: here one may have been started long ago."""
    script = (
        "import os, signal, time\nfrom multiprocessing import resource_tracker\nfrom minitron_megatron.training.stop import StopRequest\n"
        "with StopRequest().listening():\n"
        "    os.kill(resource_tracker._resource_tracker._pid, signal.SIGUSR1)\n    time.sleep(0.3)\n"
        "    print(os.waitpid(resource_tracker._resource_tracker._pid, os.WNOHANG))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "(0, 0)\n", done.stdout  # it lives
