"""Progress of a loop: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from minitron_megatron.parallel.world import World

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_BYTES = 20.0, 10.0
"""A stage that moves bytes is soon over."""


@contextmanager
def progress(what: str, total: int, world: World) -> Iterator[Callable[[], None]]:
    """Yields the function to call after each step; only the main process shows anything."""
    columns = MofNCompleteColumn(), TimeRemainingColumn()
    with _shown(_Lines(what, total, _steps_line, SECONDS_BETWEEN_LINES), columns, is_main=world.is_main) as advance:
        yield lambda: advance(1)


@contextmanager
def byte_progress(what: str, total_bytes: int, *, is_main: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with the bytes that have been written since: how many of all, how many a second, and the time that is left."""
    columns = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True)
    with _shown(_Lines(what, total_bytes, _bytes_line, SECONDS_BETWEEN_BYTES), columns, is_main=is_main) as advance:
        yield advance


@contextmanager
def _shown(lines: _Lines, columns: tuple[ProgressColumn, ...], *, is_main: bool) -> Iterator[Callable[[int], None]]:
    if not is_main:
        yield lambda count: None
    elif sys.stderr.isatty():
        with Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(lines.what, total=lines.total)
            yield lambda count: bar.advance(task, count)
    else:
        yield lines


class _Lines:
    """line: what is done, all there is, seconds since the start → text."""

    def __init__(self, what: str, total: int, line: Callable[[int, int, float], str], seconds_between: float) -> None:
        self.what, self.total = what, total
        self._done, self._line, self._seconds_between = 0, line, seconds_between
        self._started = self._shown = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown < self._seconds_between:
            return
        self._shown = now
        print(f"{self.what} {self._line(self._done, self.total, now - self._started)}", flush=True)


def _steps_line(done: int, total: int, seconds: float) -> str:
    return f"{done}/{total} | {seconds / done * (total - done):.0f} s left"


def _bytes_line(done: int, total: int, seconds: float) -> str:
    minutes, rest = divmod(round(seconds / done * max(0, total - done)), 60)
    return f"{done / 1e9:.1f}/{total / 1e9:.1f} GB · {done / seconds / 1e9:.2f} GB/s · {minutes}:{rest:02d}"
