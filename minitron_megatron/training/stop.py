"""A run that is asked to stop saves behind its next step and leaves.

SIGTERM: a pre-emption, or a launcher that is ended; SIGUSR1: the time limit is near.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def deferred() -> Iterator[None]:
    """Signals wait meanwhile, for this process and for those that it starts.

    SLURM sends them to every process of a job, and a helper of a checkpoint that is still importing would die of one (seen: EOFError in the save).
    """
    resource_tracker.ensure_running()  # which lets signals through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(Exception):
    """What a run raises behind the checkpoint that it was asked for; no error."""


class StopRequest:
    """Whether this process was asked; one that was asked is enough, for the loop adds the wishes of all up."""

    asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are wishes meanwhile. Once there was one they stay wishes: a second must not end a process that saves."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other one listen
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        resource_tracker.ensure_running()  # inherits what is ignored: SLURM sends signals to every process, and its death would be told as a fault
        for number in SIGNALS:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            if not self.asked:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
