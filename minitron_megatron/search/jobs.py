"""Jobs of a search: each is the command that a person would type, `minitron prune RECIPE` or `minitron distill RECIPE`.

A candidate runs on the processes of the recipe's `parallel`, `search.jobs` of them at the same time: jobs × processes is what the machine
has to hold. All are started on this machine; on a cluster that starts processes otherwise, `start` is the function to change.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_megatron.errors import LayoutError, TrainingError

POLL_SECONDS = 0.1
_PROGRAM = (
    # the job ends with the search: an orphan would go on writing into the folder of the next start
    "import sys; from minitron_megatron.platform.lifetime import end_with_parent; end_with_parent(int(sys.argv.pop(1))); "
    "from minitron_megatron.cli import main; main()"
)
_OF_THIS_PROCESS = (
    "TORCHELASTIC_",
    "TORCH_NCCL_",
    "GROUP_",
    "ROLE_",
    "LOCAL_",
    "MASTER_",
    "MALLOC_MMAP_",
    "MALLOC_TRIM_",
    "MINITRON_LAUNCHED",
    "RANK",
    "WORLD_SIZE",
)
"""What the launcher told the search's own process, and a job must not take for the user's."""


@dataclass(frozen=True)
class Place:
    """What one job at a time runs on."""

    threads: int
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES; None: no GPUs."""


@dataclass(frozen=True)
class Job:
    """A command on a recipe; its output goes behind what the log holds already."""

    verb: str
    recipe: Path
    log: Path


def places(jobs: int, processes: int, *, platform: str) -> list[Place]:
    """Equal shares of the machine; raises LayoutError where its GPUs are too few."""
    cores = os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    # fewer than all cores is somebody's wish, all of them is what the launcher gives to one process
    threads = int(told) if told.isdecimal() and 0 < int(told) < cores else max(1, cores // (jobs * processes))
    if platform != "cuda":
        return [Place(threads)] * jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    if len(devices) < jobs * processes:
        raise LayoutError(
            f"search.jobs={jobs} candidates × {processes} processes need {jobs * processes} GPUs, there are {len(devices)}; "
            f"set search.jobs={max(1, len(devices) // processes)}"
        )
    return [Place(threads, ",".join(devices[slot * processes : (slot + 1) * processes])) for slot in range(jobs)]


def start(job: Job, place: Place) -> subprocess.Popen[bytes]:
    """One job as a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THIS_PROCESS)}
    environment |= {"OMP_NUM_THREADS": str(place.threads)}
    environment |= {"CUDA_VISIBLE_DEVICES": place.devices} if place.devices else {}
    with job.log.open("ab") as log:
        command = [sys.executable, "-c", _PROGRAM, str(os.getpid()), job.verb, str(job.recipe)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def run_chains(chains: Sequence[Sequence[Job]], where: Sequence[Place], finished: Callable[[int], None]) -> None:
    """Runs every chain of jobs, one job after the other, as many chains at a time as there are places.

    finished: called with a chain's number as soon as its last job is done. Raises TrainingError, after the other jobs have been ended, where
    a job fails.
    """
    waiting = list(enumerate(chains))[::-1]
    running: dict[int, tuple[int, list[Job], subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for slot in set(range(len(where))) - running.keys():
                if waiting:
                    number, jobs = waiting.pop()
                    _next(running, slot, number, list(jobs), where, finished)
            time.sleep(POLL_SECONDS)
            for slot, (number, jobs, process) in list(running.items()):
                if process.poll() is None:
                    continue
                if process.returncode:
                    raise TrainingError(f"search: `minitron {jobs[0].verb} {jobs[0].recipe}` failed: {_last_words(jobs[0].log)}")
                _next(running, slot, number, jobs[1:], where, finished)
    finally:
        _end([process for _, _, process in running.values()])


def _next(
    running: dict[int, tuple[int, list[Job], subprocess.Popen[bytes]]],
    slot: int,
    number: int,
    jobs: list[Job],
    where: Sequence[Place],
    finished: Callable[[int], None],
) -> None:
    """Starts the next job of a chain on the slot, or frees the slot."""
    if jobs:
        running[slot] = (number, jobs, start(jobs[0], where[slot]))
    else:
        running.pop(slot, None)
        finished(number)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Those that do not leave when asked are killed; their workers end with them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else 'it said nothing'} (all it said: {log})"
