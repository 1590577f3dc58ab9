"""Carries runs out, each once: in fresh processes, or in this one where a plumbing test wants them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .setting import Outcome, Run

TESTS = Path(__file__).resolve().parents[1]
AT_ONCE = 4
"""Processes on one GPU: most of a small run's time is the imports. Each one's memory is its own allocator's."""
SECONDS = 570

Execute = Callable[[Run, Path], None]
"""Leaves result.json and perhaps tensors.safetensors in the run's folder."""


class RunFailed(Exception):
    """A run left no result; the message says why, in its own last words."""


@dataclass(frozen=True)
class Bench:
    """Runs below a folder: what is there already is not run again."""

    folder: Path
    execute: Execute
    at_once: int = 1

    def outcome(self, run: Run) -> Outcome:
        """Raises RunFailed."""
        folder = self.folder / run.name
        if not (folder / "result.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
            folder.mkdir(parents=True)
            self.execute(run, folder)
        return Outcome(json.loads((folder / "result.json").read_text()), folder)

    def outcomes(self, runs: Iterable[Run]) -> dict[Run, Outcome | RunFailed]:
        """Of each run, several at a time; houses first, because the others live in them."""
        every = list(dict.fromkeys(runs))
        return {**self._several([run for run in every if run.kind == "house"]), **self._several([run for run in every if run.kind != "house"])}

    def _several(self, runs: list[Run]) -> dict[Run, Outcome | RunFailed]:
        with ThreadPoolExecutor(self.at_once) as pool:
            return dict(zip(runs, pool.map(self._tried, runs), strict=True))

    def _tried(self, run: Run) -> Outcome | RunFailed:
        try:
            return self.outcome(run)
        except RunFailed as failure:
            return failure


def in_processes(folder: Path) -> Bench:
    return Bench(folder, in_a_fresh_process, AT_ONCE)


def in_a_fresh_process(run: Run, folder: Path) -> None:
    """The choice of CPU or CUDA belongs to a process, and so do environment variables that libraries read once."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    threads = str(max(1, (os.cpu_count() or 1) // AT_ONCE))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, **run.setting.environment()}
    command = [sys.executable, "-m", "gpu.runs", run.to_json(), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=TESTS.parent)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{run.name}: not through after {SECONDS} s") from None
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RunFailed(f"{run.name}: {last_words(done.stderr)}")


def last_words(stderr: str) -> str:
    """The last line that is not indented: an exception's own, or an error in one line."""
    lines = [line for line in stderr.splitlines() if line.strip() and not line[0].isspace()]
    return lines[-1] if lines else "it said nothing"
