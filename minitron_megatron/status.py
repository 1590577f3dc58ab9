"""status.json in a stage's folder: what a job does, for people and for the script that decides whether it is worth another start.

`runs/NAME/.STAGE.partial/status.json` while the stage works, `runs/NAME/STAGE/status.json` once it is published. slurm/common.sh writes it
too, where no Python of ours runs: queued, and why a job will not go on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from minitron_megatron.artifact import partial_folder

State = Literal["queued", "running", "saved", "failed", "finished"]

FILE = "status.json"

SECONDS_BETWEEN = 1.0
"""Of two steps that are told: a shared disk is not to be asked at each of many short ones."""


def tell(folder: Path, state: State, **facts: Any) -> None:
    """Writes what holds now beside the job it holds of; folder: the stage's. Nothing where the folder does not exist."""
    if not folder.is_dir():
        return
    job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    told = {"state": state, **job, **facts, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    temporary = folder / f"{FILE}.{os.getpid()}"  # launchers of two nodes may fail at the same time
    temporary.write_text(json.dumps(told, indent=2) + "\n")
    temporary.replace(folder / FILE)


def read(folder: Path) -> dict[str, Any]:
    """What was told last in this folder; empty where nothing was."""
    return json.loads((folder / FILE).read_text()) if (folder / FILE).is_file() else {}


def steps_of(folder: Path) -> dict[str, int]:
    """How far the stage had come when something was told last; empty for one without steps."""
    known = read(folder)
    return {name: known[name] for name in ("step", "steps", "saved_step") if name in known}


def told(run: Path, stage: str) -> dict[str, Any]:
    """What the stage's newest job tells: of one that works anew in preference to what an older one published."""
    return read(partial_folder(run, stage)) or read(run / stage)


def withdraw(folder: Path) -> None:
    """A job that found nothing to do takes back that it waited to do it; work that an interrupted start left there stays."""
    (folder / FILE).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or not empty
        folder.rmdir()


class StepStatus:
    """Tells the steps of a loop; on the main process only."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._steps, self._last = folder, steps, 0.0

    def step(self, step: int, newest_saved: Callable[[], int]) -> None:
        """newest_saved: the step of the newest whole checkpoint, which is what counts as progress when a job is started again."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN:
            self._last = now
            tell(self._folder, "running", step=step, steps=self._steps, saved_step=newest_saved())

    def saved(self, step: int, why: str) -> None:
        tell(self._folder, "saved", step=step, steps=self._steps, saved_step=step, why=why)
