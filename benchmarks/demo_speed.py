"""Tokens a second of the demo's distillation (SmolLM2-135M → 97M, PP=2 on two CPU processes), ours now beside our first version.

Each version makes its own inputs from the demo's model and text, by the same settings, then all distil at the same time, but by turns: while
one works the others are stopped. Ours with more samples a step beside it: what a step costs whatever its size is shared by more tokens.
Claim: ≥ 1.5 × the first version's tokens/s.
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
LARGER_BATCH = 4
TURNS, STEPS_A_TURN = 5, 5
TIMEOUT_SECONDS = 120


class Version:
    """A checkout that makes its inputs and then distils, when it is its turn."""

    def __init__(self, name: str, tree: Path, runs: Path, *overrides: str) -> None:
        self.name, self.tree, self.runs, self.overrides = name, tree, runs, overrides
        self.seconds = list[float]()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None

    def make_inputs(self) -> None:
        for stage in INPUTS:
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
        return [sys.executable, "-m", "minitron_megatron.cli", stage, RECIPE, f"runs={self.runs}", *SETTINGS, *self.overrides]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.tree), "HF_HUB_OFFLINE": "1"}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        versions = [
            Version(f"first version ({FIRST[:7]})", first_version(folder), folder / "runs_first"),
            Version("now", ROOT, folder / "runs_now"),
            Version(f"now, {LARGER_BATCH} samples a step", ROOT, folder / "runs_larger", f"distill.global_batch={LARGER_BATCH}"),
        ]
        for version in versions:
            version.runs.mkdir()
            version.make_inputs()
        try:
            alternate(versions)
        finally:
            for version in versions:
                version.end()
        report(*versions)


def first_version(folder: Path) -> Path:
    """Its files, in a folder of their own, with the demo's inputs."""
    tree = folder / "first"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", FIRST], check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x"], check=True, cwd=tree, input=archive)
    (tree / ".demo").symlink_to(ROOT / ".demo")
    return tree


def alternate(versions: list[Version]) -> None:
    for version in versions:
        version.start()
        version.each(psutil.Process.suspend)
    for _ in range(TURNS):
        for version in versions:
            version.turn()


def report(first: Version, now: Version, larger: Version) -> None:
    pairs = list(zip(first.records(), now.records(), strict=False))[:5]
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs)
    rows = [
        f"| {x.name} | {x.tokens} | {statistics.median(x.seconds):.3f} | {min(x.seconds):.3f} – {max(x.seconds):.3f} | {x.speed:.0f} "
        f"| {x.speed / first.speed:.2f} |"
        for x in (first, now, larger)
    ]
    text = "\n".join(
        [
            f"bf16, PP=2, one thread each; {TURNS} turns each of {STEPS_A_TURN} steps. With equal batches the losses of the first five steps differ "
            f"by {apart:.1e} at most (relative).",
            "",
            "| version | tokens a step | seconds a step (median) | from – to | tokens/s | ratio |",
            "|---|--:|--:|--:|--:|--:|",
            *rows,
        ]
    )
    figures = {
        "tokens_per_second": {"first": first.speed, "now": now.speed, "larger_batch": larger.speed},
        "ratio": now.speed / first.speed,
        "ratio_larger_batch": larger.speed / first.speed,
        "claim": 1.5,
        "loss_difference": apart,
    }
    write_result("demo_speed", "The demo's distillation, now and in the first version", text, figures)


if __name__ == "__main__":
    main()
