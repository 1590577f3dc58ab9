"""How far tokenizing is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


@dataclass
class TokenProgress:
    """Counts read bytes, documents and tokens; use it in a `with` statement.

    total_bytes: size of all files. Read bytes advance by whole files, tokens by blocks.
    """

    title: str
    total_bytes: int
    seconds_between_lines: float = 30.0
    documents: int = 0
    tokens: int = 0
    _read_bytes: int = 0
    _started: float = field(default_factory=time.monotonic)
    _last_line: float = field(default_factory=time.monotonic)
    _bar: Progress | None = None
    _task: TaskID | None = None

    def __enter__(self) -> TokenProgress:
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.title, total=max(self.total_bytes, 1))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self.tokens:
            print(self._line(), file=sys.stderr)

    def file_read(self, size_bytes: int) -> None:
        self._read_bytes += size_bytes

    def block_written(self, documents: int, tokens: int) -> None:
        self.documents += documents
        self.tokens += tokens
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._read_bytes, description=self._line())
        elif time.monotonic() - self._last_line > self.seconds_between_lines:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr)

    def _line(self) -> str:
        share = self._read_bytes / max(self.total_bytes, 1)
        speed = self.tokens / max(time.monotonic() - self._started, 1e-9)
        counts = f"{self.documents:,} documents | {_short(self.tokens)} tokens"
        return f"{self.title} {share:.0%} | {counts} | {_short(speed)} tok/s"


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
