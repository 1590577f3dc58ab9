"""Tokens a second of the demo's distillation (SmolLM2-135M → 97M, PP=2 on two CPU processes), ours now beside our first version.

Each version makes its own inputs from the demo's model and text, by the same settings, then both distil at the same time, but by turns: while
one works the other one is stopped. Claim: ≥ 1.5 × the first version's tokens/s.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from common import RECIPE, write_result

ROOT = Path(__file__).resolve().parent.parent
NAME = "smollm2_135m_to_97m"
FIRST = "6d5f98960e"  # the last commit before layouts other than one process, DP and PP
INPUTS = ("import", "data", "importance", "prune")
SETTINGS = ("importance.samples=8", "distill.validation_samples=1")
TURNS, STEPS_A_TURN = 6, 5
TIMEOUT_SECONDS = 120


class Version:
    """A checkout that makes its inputs and then distils, when it is its turn."""

    def __init__(self, tree: Path, runs: Path) -> None:
        self.tree, self.runs, self.seconds = tree, runs, list[float]()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None

    def make_inputs(self) -> None:
        for stage in INPUTS:
            print(f"$ {self.tree.name}: minitron {stage}", flush=True)
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

    def _wait_for(self, steps: int) -> None:
        until = time.monotonic() + TIMEOUT_SECONDS
        while len(self.records()) < steps:
            if time.monotonic() > until or self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"{self.tree} makes no steps:\n{(self.runs / 'distill.log').read_text()[-2000:]}")
            time.sleep(0.25)  # seldom: both cores are being measured

    def _command(self, stage: str) -> list[str]:
        return [sys.executable, "-m", "minitron_megatron.cli", stage, RECIPE, f"runs={self.runs}", *SETTINGS]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.tree), "HF_HUB_OFFLINE": "1"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, now = Version(first_version(Path(folder)), Path(folder) / "runs_first"), Version(ROOT, Path(folder) / "runs_now")
        for version in (first, now):
            version.runs.mkdir()
            version.make_inputs()
        try:
            alternate(first, now)
        finally:
            for version in (first, now):
                version.end()
        report(first, now)


def first_version(folder: Path) -> Path:
    """Its files, in a folder of their own, with the demo's inputs."""
    tree = folder / "first"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", FIRST], check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x"], check=True, cwd=tree, input=archive)
    (tree / ".demo").symlink_to(ROOT / ".demo")
    return tree


def alternate(first: Version, now: Version) -> None:
    for version in (first, now):
        version.start()
        version.each(psutil.Process.suspend)
    for _ in range(TURNS):
        for version in (first, now):
            version.turn()


def report(first: Version, now: Version) -> None:
    tokens = first.records()[0]["tokens_per_second"] * first.records()[0]["seconds"]
    speeds = {name: tokens / statistics.median(version.seconds) for name, version in (("first", first), ("now", now))}
    pairs = list(zip(first.records(), now.records(), strict=False))[: TURNS * STEPS_A_TURN]
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs[:5])
    rows = [
        f"| {name} | {statistics.median(version.seconds):.3f} | {min(version.seconds):.3f} – {max(version.seconds):.3f} | {speeds[key]:.0f} |"
        for key, name, version in (("first", f"first version ({FIRST[:7]})", first), ("now", "now", now))
    ]
    text = "\n".join(
        [
            f"{round(tokens)} tokens a step, bf16, PP=2, one thread each; {TURNS} turns each, {len(first.seconds)} and {len(now.seconds)} steps.",
            f"Losses of the first five steps differ by {apart:.1e} at most (relative).",
            "",
            "| version | seconds a step (median) | from – to | tokens/s |",
            "|---|--:|--:|--:|",
            *rows,
            "",
            f"Ratio: {speeds['now'] / speeds['first']:.2f}.",
        ]
    )
    figures = {"tokens_per_second": speeds, "ratio": speeds["now"] / speeds["first"], "claim": 1.5, "loss_difference": apart}
    write_result("demo_speed", "The demo's distillation, now and in the first version", text, figures)


if __name__ == "__main__":
    main()
