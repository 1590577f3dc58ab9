"""Carries runs out, each once: in fresh processes, or in this one where a plumbing test wants them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from .setting import Outcome, Run

TESTS = Path(__file__).resolve().parents[1]
AT_ONCE = 4
"""Processes on one GPU: most of a small run's time is the imports. Each one's memory is its own allocator's."""
SECONDS = 570
"""Of one run at the most."""
ENDS = time.monotonic() + float(os.environ.get("GPU_SECONDS", "inf"))
"""Where a command may take only so long: runs end before it does, and what was measured is told."""
LEAST_SECONDS = 20
"""Less is not worth a run's imports."""

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
        except Exception as error:  # a file that is no result: this run's failure alone
            return RunFailed(f"{run.name}: {type(error).__name__}: {error}")


def in_processes(folder: Path) -> Bench:
    return Bench(folder, in_a_fresh_process, AT_ONCE)


def in_a_fresh_process(run: Run, folder: Path) -> None:
    """The choice of CPU or CUDA belongs to a process, and so do environment variables that libraries read once."""
    left = min(SECONDS, ENDS - time.monotonic())
    if left < LEAST_SECONDS:
        raise RunFailed(f"{run.name}: no time left; the same command goes on from here")
    said, began = folder / "output.txt", time.monotonic()
    with said.open("w") as output:
        command = [sys.executable, "-m", "gpu.runs", run.to_json(), str(folder)]
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment_of(run), cwd=TESTS.parent)
        code = ended(process, left)
    print(f"{run.name}: {time.monotonic() - began:.0f} s", flush=True)
    if code is None:
        raise RunFailed(f"{run.name}: not through after {left:.0f} s")
    if code:
        raise RunFailed(f"{run.name}: {last_words(said.read_text())}")


def environment_of(run: Run) -> dict[str, str]:
    """A run on a CPU turns dynamo off for itself; what this process has turned off, as pytest's does, is not for runs on CUDA."""
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    threads = str(max(1, (os.cpu_count() or 1) // AT_ONCE))
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}  # unbuffered: last words stay last
    return {**inherited, **fixed, **run.setting.environment()}


def ended(process: psutil.Popen, seconds: float) -> int | None:
    """The exit code; None where the time was over first, and then what it had started is gone as well: a worker would keep the GPU."""
    try:
        return int(process.wait(seconds))
    except psutil.TimeoutExpired:
        for one in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        return None


def last_words(told: str) -> str:
    """The last line that is not indented: an exception's own, or an error in one line."""
    lines = [line for line in told.splitlines() if line.strip() and not line[0].isspace()]
    return lines[-1] if lines else "it said nothing"
