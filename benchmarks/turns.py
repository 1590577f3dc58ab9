"""Distillations that work by turns: while one makes its steps the others are stopped, so that a drift of the machine meets all of them."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from common import RECIPE

NAME = "smollm2_135m_to_97m"
TURNS, STEPS_A_TURN = 5, 5
MOST_STEPS = 2 + TURNS * (STEPS_A_TURN + 1)
"""That a distillation makes in all turns."""
TIMEOUT_SECONDS = 120


class Distillation:
    """`minitron distill` of a checkout, which works when it is its turn."""

    def __init__(self, name: str, tree: Path, runs: Path, *overrides: str) -> None:
        self.name, self.tree, self.runs, self.overrides = name, tree, runs, overrides
        self.seconds = list[float]()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None

    def make_inputs(self, stages: Sequence[str]) -> None:
        for stage in stages:
            print(f"{self.name}: minitron {stage}", flush=True)
            subprocess.run(self._command(stage), check=True, cwd=self.tree, env=self._environment())

    def start(self) -> None:
        """Up to the first steps, which are not counted: they touch memory for the first time."""
        with (self.runs / "distill.log").open("wb") as log:
            self._process = subprocess.Popen(self._command("distill"), cwd=self.tree, env=self._environment(), stdout=log, stderr=log)
        self._wait_for(2)

    def turn(self) -> None:
        """Some steps more; the one during which it was stopped is not counted."""
        self.each(psutil.Process.resume)
        finished = len(self.records())
        self._wait_for(finished + STEPS_A_TURN)
        self.each(psutil.Process.suspend)
        self.seconds += [record["seconds"] for record in self.records()[finished + 1 :]]

    def each(self, do: Callable[[psutil.Process], None]) -> None:
        """To the launcher and its workers."""
        if self._process is not None and self._process.poll() is None:
            launcher = psutil.Process(self._process.pid)
            for process in (launcher, *launcher.children(recursive=True)):
                do(process)

    def end(self) -> None:
        self.each(psutil.Process.resume)
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(TIMEOUT_SECONDS)

    def records(self) -> list[dict[str, Any]]:
        """Of the steps that are finished; the line behind the last line end is still being written."""
        self._log = self._log or next((self.runs / NAME).glob("**/metrics.jsonl"), None)
        lines = self._log.read_text().split("\n")[:-1] if self._log else []
        return [record for record in map(json.loads, lines) if record["step"]]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return round(self.records()[0]["tokens_per_second"] * self.records()[0]["seconds"])

    @property
    def speed(self) -> float:
        """Median, tokens a second."""
        return self.tokens / statistics.median(self.seconds)

    def _wait_for(self, steps: int) -> None:
        until = time.monotonic() + TIMEOUT_SECONDS
        while len(self.records()) < steps:
            if time.monotonic() > until or self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"{self.tree} makes no steps:\n{(self.runs / 'distill.log').read_text()[-2000:]}")
            time.sleep(0.25)  # seldom: both cores are being measured

    def _command(self, stage: str) -> list[str]:
        return [sys.executable, "-m", "minitron_megatron.cli", stage, RECIPE, f"runs={self.runs}", *self.overrides]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.tree), "HF_HUB_OFFLINE": "1"}


def by_turns(distillations: Sequence[Distillation]) -> None:
    """Starts them, has each make its steps in turn, and ends them."""
    try:
        for one in distillations:
            one.start()
            one.each(psutil.Process.suspend)
        for _ in range(TURNS):
            for one in distillations:
                one.turn()
    finally:
        for one in distillations:
            one.end()
