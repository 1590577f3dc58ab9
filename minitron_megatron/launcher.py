"""torchrun for a stage: starts its processes and shows the first error of any of them, once.

`python -m minitron_megatron.launcher STAGE RECIPE [key=value…]`, or launch/torchrun.sh. From the environment: NPROC, processes on
this node (default: its GPUs, else the recipe's number); SLURM_NNODES, SLURM_NODEID, MASTER_ADDR, MASTER_PORT: several nodes, one call on each.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from minitron_megatron.chain import STAGES
from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import LayoutError, MinitronError
from minitron_megatron.failure import LAUNCHED, exit_code_of, message_of

USER_ENVIRONMENT = dict(os.environ)
"""As it was before the first launch: a later stage must not take an earlier one's settings for the user's."""


def main(arguments: list[str]) -> int:
    """Exit code of the stage; 2 for a user's mistake, told in one line."""
    try:
        if len(arguments) < 2 or arguments[0] not in STAGES:
            raise MinitronError(f"usage: launch/torchrun.sh STAGE RECIPE [key=value…]; stages: {', '.join(STAGES)}")
        stage, recipe, *overrides = arguments
        if not STAGES[stage].distributed:
            # one process on the first node does the work of a stage that is not distributed
            return launch(stage, recipe, overrides, 1) if _number(os.environ, "SLURM_NODEID", 0) == 0 else 0
        processes = processes_here(recipe, overrides, os.environ)
        return launch(stage, recipe, overrides, processes, rendezvous(os.environ))
    except MinitronError as error:
        print(error, file=sys.stderr)
        return 2


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
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", "minitron_megatron.worker", stage, recipe_path, *overrides]))
        return 0
    except ChildFailedError as error:
        print(message_of(error.failures, stage), file=sys.stderr, flush=True)
        return exit_code_of(error.failures)
    except (SignalException, KeyboardInterrupt):
        print(f"{stage}: interrupted; the same command continues where it stopped", file=sys.stderr, flush=True)
        return 130


def processes_here(recipe_path: str, overrides: list[str], environment: Mapping[str, str]) -> int:
    """NPROC, else this node's GPUs, else the node's part of the recipe's processes."""
    of_recipe = load_recipe(recipe_path, overrides).parallel.processes // _number(environment, "SLURM_NNODES", 1)
    return _number(environment, "NPROC", torch.cuda.device_count() or max(1, of_recipe))


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
    """Settings of every worker process that the user has not set otherwise, each with its reason.

    streams: for a stage that moves tensors one by one, and must not keep more of them than it holds.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        # threads that spin while they wait make matmuls several times slower on a busy machine
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        # large tensors come back from the heap and in huge pages: fresh pages for each one took a quarter of a CPU step;
        # for a stream each has pages of its own: holes that the next one does not fit into made the heap four times as large
        "MALLOC_MMAP_MAX_": "65536" if streams else "0",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "THP_MEM_ALLOC_ENABLE": "1",
        # the data stage makes its own processes; a tokenizer that forks after using threads warns
        "TOKENIZERS_PARALLELISM": "false",
    }
    settings = {name: USER_ENVIRONMENT.get(name, value) for name, value in defaults.items()}
    # never the user's: a launcher that another one's process starts would hand on that one's id, and its workers would leave as orphans
    return {**settings, LAUNCHED: str(os.getpid())}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
