"""The processes that play ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from .cases import Case
from .imagined import aim_at_meta
from .ranks import Part, play

AT_A_TIME = 8
"""Ranks that a process plays before it says what they said."""
Play = Callable[[Case], list[Part]]


@pytest.fixture(scope="session")
def played() -> Iterator[Play]:
    """played(case): what all its ranks say, in their order."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
    # started anew: their megatron is aimed at another device, and this process's is loaded
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), initializer=aim_at_meta) as players:

        def ask(case: Case) -> list[Part]:
            ranks = range(case.parallel.processes)
            calls = [players.submit(play, case, ranks[first : first + AT_A_TIME]) for first in ranks[::AT_A_TIME]]
            return [part for call in calls for part in call.result()]

        yield ask
