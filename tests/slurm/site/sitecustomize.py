"""Makes a rank wait, or die, where a test says: what disturbs a job then meets it in the same place on every machine. Python imports this first.

HOLD="0:step_00000020 1:step_00000040": after so many restarts of its job, rank 0 goes no further once it has that checkpoint, until it is
asked to stop, or killed. DIES=3: that rank is killed as it begins.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

RANK, RESTARTS = os.environ.get("RANK"), os.environ.get("SLURM_RESTART_COUNT", "0")
HOLDS = dict(item.split(":") for item in os.environ.get("HOLD", "").split())


def hold(*_: object) -> None:
    """A handler of signals, so that the run goes on just a little behind the checkpoint; what it is asked with interrupts the wait."""
    stop: Any = signal.getsignal(signal.SIGUSR1)
    while not stop.__self__.asked:  # a StopRequest's method listens while a run trains
        time.sleep(0.05)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename" and os.path.basename(str(arguments[1])) == HOLDS[RESTARTS]:
        signal.signal(signal.SIGALRM, hold)
        signal.setitimer(signal.ITIMER_REAL, 0.05)


if RANK == "0" and RESTARTS in HOLDS:
    sys.addaudithook(watch)
if RANK is not None and os.environ.get("DIES") == RANK:
    os.kill(os.getpid(), signal.SIGKILL)
