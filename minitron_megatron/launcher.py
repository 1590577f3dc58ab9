"""Starts the processes of a stage on this machine and shows the first error of any of them, once."""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

LAUNCHED = "MINITRON_LAUNCHED"


def launch(stage: str, recipe_path: str, overrides: list[str], processes: int) -> int:
    """Runs a stage in this many processes; returns its exit code. Errors have been shown by then."""
    os.environ.update(worker_environment(processes))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we tell what failed ourselves
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # a rank that died leaves the others in a collective that they never leave by themselves
        shutdown_timeout=10,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "minitron_megatron.worker", stage, recipe_path, *overrides)
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(_message(failure, rank, stage), file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 1
    except (SignalException, KeyboardInterrupt):
        print(f"{stage}: interrupted; the same command continues where it stopped", file=sys.stderr, flush=True)
        return 130


def worker_environment(processes: int) -> dict[str, str]:
    """Settings of every worker process that the user has not set otherwise, each with its reason."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    defaults = {
        LAUNCHED: "1",
        "OMP_NUM_THREADS": str(threads),
        # threads that spin while they wait make matmuls several times slower on a busy machine
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        # large tensors come back from the heap and in huge pages: fresh pages for each one took a quarter of a CPU step
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "THP_MEM_ALLOC_ENABLE": "1",
        # the data stage makes its own processes; a tokenizer that forks after using threads warns
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def _message(failure: ProcessFailure, rank: int, stage: str) -> str:
    """One line for a user's mistake; else the first failing rank and its traceback."""
    recorded = _recorded(failure)
    if failure.exitcode == 2 and recorded:
        return recorded["message"].split(": ", 1)[1]
    trace = recorded["extraInfo"]["py_callstack"] if recorded else failure.message
    return f"{stage}: rank {rank} failed (exit code {failure.exitcode})\n{trace}"


def _recorded(failure: ProcessFailure) -> dict | None:
    path = Path(failure.error_file)
    return json.loads(path.read_text())["message"] if path.is_file() else None
