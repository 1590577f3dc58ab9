"""Progress of a loop: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minitron_megatron.parallel.world import World

SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def progress(what: str, total: int, world: World) -> Iterator[Callable[[], None]]:
    """Yields the function to call after each step; only the main process shows anything."""
    if not world.is_main:
        yield lambda: None
    elif sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
    else:
        yield _Lines(what, total)


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._shown = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        remaining = (now - self._started) / self._done * (self._total - self._done)
        print(f"{self._what} {self._done}/{self._total} | {remaining:.0f} s left", flush=True)
