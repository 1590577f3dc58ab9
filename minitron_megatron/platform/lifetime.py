"""Processes that end with the one that started them: orphans of a killed run would go on writing into the folder of the next start."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def end_with_parent(parent: int | None = None) -> None:
    """From here on the system kills this process when its parent dies; on Linux alone.

    parent: its process id, where it may have died while this process was still importing; it is ended at once then.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def run_ending_with_parent(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a forked process runs in place of `function`: it and the processes that it forks end with their parents."""
    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)
    return function(*arguments, **options)
