"""torchrun for a stage: starts its processes and shows the first error of any of them, once.

`python -m minitron_megatron.launcher [--restarts=N] [--fill-data] STAGE RECIPE [key=value…]`, or launch/torchrun.sh. From the environment: NPROC,
processes on this node (default: its GPUs, else the recipe's number); SLURM_NNODES, SLURM_NODEID, MASTER_ADDR, MASTER_PORT: several nodes, one
call on each; MINITRON_JOB: folder of the SLURM job that this is a part of.

SIGTERM and SIGUSR1 are handed on to the processes: a training saves behind its next step, and the exit code is 75.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from minitron_megatron import environment
from minitron_megatron.artifact import partial_folder
from minitron_megatron.chain import STAGES, run_folder
from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import LayoutError, MinitronError
from minitron_megatron.failure import LAUNCHED, STOPPED, exit_code_of, is_consequence, message_of
from minitron_megatron.health import require_health
from minitron_megatron.status import read, steps_of, tell

JOB = "MINITRON_JOB"

USAGE = "usage: launch/torchrun.sh [--restarts=N] [--fill-data] STAGE RECIPE [key=value…]"


def main(arguments: list[str]) -> int:
    """Exit code of the stage; 2 for a user's mistake, told in one line; STOPPED where it was asked to stop."""
    try:
        options = [item for item in arguments if item.startswith("--")]
        restarts, fills = _options(options)
        rest = [item for item in arguments if not item.startswith("--")]
        if len(rest) < 2 or rest[0] not in STAGES:
            raise MinitronError(f"{USAGE}; stages: {', '.join(STAGES)}")
        stage, recipe, *overrides = rest
        folder = partial_folder(run_folder(load_recipe(recipe, overrides)), stage)
        _introduce(folder)
        try:
            return _start(stage, recipe, overrides, folder, restarts=restarts, fills=fills)
        except MinitronError as error:
            _tell_failure(folder, str(error))
            raise
    except MinitronError as error:
        print(error, file=sys.stderr)
        return 2


def _options(options: list[str]) -> tuple[int, bool]:
    """How often processes that died are started again without having come further, and whether data parallelism takes what the nodes have."""
    restarts = [item.removeprefix("--restarts=") for item in options if item.startswith("--restarts=")]
    unknown = [item for item in options if item != "--fill-data" and not item.startswith("--restarts=")]
    if unknown or not all(number.isdecimal() for number in restarts):
        raise MinitronError(f"{' '.join(unknown or options)}: no such option; {USAGE}")
    return int(restarts[-1]) if restarts else 0, "--fill-data" in options


def _start(stage: str, recipe: str, overrides: list[str], folder: Path, *, restarts: int, fills: bool) -> int:
    require_health(folder)
    if not STAGES[stage].distributed:
        # one process on the first node does the work of a stage that is not distributed
        return launch(stage, recipe, overrides, 1) if _number(os.environ, "SLURM_NODEID", 0) == 0 else 0
    processes, where = processes_here(recipe, overrides, os.environ), rendezvous(os.environ)
    if fills:
        overrides = filled(recipe, overrides, processes * _number(os.environ, "SLURM_NNODES", 1))
    if restarts and where != ("--standalone",):
        raise LayoutError("--restarts is for one node: on several, SLURM starts the job again (slurm/common.sh); leave it out")
    return _launch_again(stage, recipe, overrides, processes, where, restarts)


def _launch_again(stage: str, recipe: str, overrides: list[str], processes: int, where: tuple[str, ...], restarts: int) -> int:
    """Processes that died are started again, each time at once; after `restarts` times without a new checkpoint it is given up."""
    folder, left = run_folder(load_recipe(recipe, overrides)), restarts
    while True:
        before = saved_step(folder, stage)
        code = launch(stage, recipe, overrides, processes, where)
        left = restarts if saved_step(folder, stage) > before else left - 1
        if code != 1 or not restarts or left < 0:
            return code
        print(f"{stage}: started again from its last checkpoint; {left} more without a new one", file=sys.stderr, flush=True)


def saved_step(run: Path, stage: str) -> int:
    """Of the newest whole checkpoint of a training that is not finished; 0 where there is none."""
    return max((int(step.name.removeprefix("step_")) for step in (partial_folder(run, stage) / "training").glob("step_*")), default=0)


def launch(stage: str, recipe_path: str, overrides: list[str], processes: int, where: tuple[str, ...] = ("--standalone",)) -> int:
    """Runs a stage in this many processes of this node; returns its exit code. Errors have been shown by then."""
    with tempfile.TemporaryDirectory(prefix="minitron_") as errors:
        return _launch(stage, recipe_path, overrides, processes, [*where, f"--log-dir={errors}"])


def _launch(stage: str, recipe_path: str, overrides: list[str], processes: int, where: list[str]) -> int:
    """where: torchrun's options for the meeting, and for the folder in which processes leave their errors: its own would stay behind."""
    os.environ.update(worker_environment(processes, streams=STAGES[stage].streams))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we tell what failed ourselves
    # a rank that died leaves the others in a collective that they never leave by themselves: they get 10 s
    options = [*where, f"--nproc-per-node={processes}", "--local-addr=localhost", "--shutdown-timeout=10"]
    if "--standalone" not in where:
        options.remove("--local-addr=localhost")
    with _handing_signals_on() as asked:
        try:
            torchrun.run(_parsed([*options, "-m", "minitron_megatron.worker", stage, recipe_path, *overrides]))
            return 0
        except ChildFailedError as error:
            code = exit_code_of(error.failures, asked=bool(asked))
            message = f"{stage}: stopped; the same command goes on where it stopped" if code == STOPPED else message_of(error.failures, stage)
            print(message, file=sys.stderr, flush=True)
            if code != STOPPED:
                folder = partial_folder(run_folder(load_recipe(recipe_path, overrides)), stage)
                _tell_failure(folder, message.splitlines()[0], consequence=is_consequence(error.failures))
            return code
        except (SignalException, KeyboardInterrupt):
            print(f"{stage}: interrupted; the same command continues where it stopped", file=sys.stderr, flush=True)
            return 130


def _parsed(arguments: list[str]) -> object:
    """torchrun's own handlers would end the processes with the launcher's SIGTERM: it is left to ours."""
    handled = "SIGINT,SIGHUP,SIGQUIT"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = handled
    options = torchrun.parse_args(arguments)
    if hasattr(options, "signals_to_handle"):  # from torch 2.10 on, where it overwrites the variable
        options.signals_to_handle = handled
    return options


@contextmanager
def _handing_signals_on() -> Iterator[list[int]]:
    """Yields the signals that came so far. One that is ignored, as slurm/common.sh has SIGUSR1, reaches the processes without us."""
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _introduce(folder: Path) -> None:
    """Tells the batch script of the job where the stage works, and so where its status is."""
    job = os.environ.get(JOB)
    if job and _number(os.environ, "SLURM_NODEID", 0) == 0:
        (Path(job) / "stage_folder").write_text(f"{folder.resolve()}\n")
        tell(folder, "running", **steps_of(folder))


def _tell_failure(folder: Path, why: str, *, consequence: bool = False) -> None:
    """In a job the status outlives a stage of which nothing is left; a node that lost another leaves the word to that one."""
    if os.environ.get(JOB):
        folder.mkdir(parents=True, exist_ok=True)
    if not (consequence and read(folder).get("state") == "failed"):
        tell(folder, "failed", why=why, **steps_of(folder))


def processes_here(recipe_path: str, overrides: list[str], environment: Mapping[str, str]) -> int:
    """NPROC, else this node's GPUs, else the node's part of the recipe's processes."""
    of_recipe = load_recipe(recipe_path, overrides).parallel.processes // _number(environment, "SLURM_NNODES", 1)
    return _number(environment, "NPROC", torch.cuda.device_count() or max(1, of_recipe))


def filled(recipe_path: str, overrides: list[str], processes: int) -> list[str]:
    """With parallel.data as large as the processes allow, unless the user named it; raises LayoutError where they are no multiple of the rest."""
    if any(item.startswith("parallel.data=") for item in overrides):
        return overrides
    return [*overrides, f"parallel.data={load_recipe(recipe_path, overrides).parallel.replicas(processes)}"]


def rendezvous(environment: Mapping[str, str]) -> tuple[str, ...]:
    """torchrun's options for where the processes meet; static over several nodes, because c10d would put rank 0 on any of them."""
    nodes = _number(environment, "SLURM_NNODES", 1)
    if nodes == 1:
        return ("--standalone",)
    if "MASTER_ADDR" not in environment:
        raise LayoutError(
            f"SLURM_NNODES={nodes}, but MASTER_ADDR is not set: export the first node's address, "
            "for example the first line of: scontrol show hostnames $SLURM_JOB_NODELIST"
        )
    port = environment.get("MASTER_PORT", str(20000 + _number(environment, "SLURM_JOB_ID", 0) % 10000))
    rank = environment.get("SLURM_NODEID", "0")
    return (f"--nnodes={nodes}", f"--node-rank={rank}", f"--master-addr={environment['MASTER_ADDR']}", f"--master-port={port}")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise LayoutError(f"{name}={text} is no whole number; set it to a number of processes or nodes, or unset it")
    return int(text)


def worker_environment(processes: int, *, streams: bool = False) -> dict[str, str]:
    """The settings of environment.py, and who started the worker."""
    # never the user's: a launcher that another one's process starts would hand on that one's id, and its workers would leave as orphans
    return {**environment.worker_environment(processes, streams=streams), LAUNCHED: str(os.getpid())}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
