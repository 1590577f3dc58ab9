"""The environment of every worker process: what is set and why, and what of it stands in the manifest of what the worker made."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

USER_ENVIRONMENT = dict(os.environ)
"""As it was before the first launch: a later stage must not take an earlier one's settings for the user's."""

_RECORDED = re.compile(
    r"SLURM_(JOB_(ID|NAME|NODELIST|PARTITION)|NNODES|RESTART_COUNT|GPUS_ON_NODE|CLUSTER_NAME)|(NCCL|GLOO|TORCH\w*|PYTORCH|CUDA|NVTE|OMP|GOMP|MALLOC|THP|UCX)_"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)


def worker_environment(processes: int, *, streams: bool = False) -> dict[str, str]:
    """Settings of every worker process that the user has not set otherwise, each with its reason.

    processes: on this node. streams: for a stage that moves tensors one by one, and must not keep more of them than it holds.
    """
    defaults = {**_threads(processes), **_host_memory(streams), **_nccl(), **_cuda_memory()}
    return {name: USER_ENVIRONMENT.get(name, value) for name, value in defaults.items()}


def recorded() -> dict[str, Any]:
    """Where this process runs and what of its environment shapes how, for the manifest; nothing that looks like a secret."""
    kept = {name: value for name, value in sorted(os.environ.items()) if _RECORDED.match(name) and not _SECRET.search(name)}
    return {"host": socket.gethostname(), "container": os.environ.get("MINITRON_CONTAINER", ""), "variables": kept}


def _threads(processes: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        # threads that spin while they wait make matmuls several times slower on a busy machine
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        # the data stage makes its own processes; a tokenizer that forks after using threads warns
        "TOKENIZERS_PARALLELISM": "false",
    }


def _host_memory(streams: bool) -> dict[str, str]:
    return {
        # large tensors come back from the heap and in huge pages: fresh pages for each one took a quarter of a CPU step;
        # for a stream each has pages of its own: holes that the next one does not fit into made the heap four times as large
        "MALLOC_MMAP_MAX_": "65536" if streams else "0",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "THP_MEM_ALLOC_ENABLE": "1",
    }


def _nccl() -> dict[str, str]:
    return {
        # why a connection failed is worth its lines in a rank's log; INFO is hundreds of them at each start
        "NCCL_DEBUG": "WARN",
    }


def _cuda_memory() -> dict[str, str]:
    # states of teacher and student alternate in size: growing segments leave no holes between them
    name = "PYTORCH_ALLOC_CONF" if _torch_at_least(2, 10) else "PYTORCH_CUDA_ALLOC_CONF"  # the older name warns from 2.10 on
    return {name: "expandable_segments:True"}


def _torch_at_least(major: int, minor: int) -> bool:
    from importlib.metadata import version

    found = re.match(r"(\d+)\.(\d+)", version("torch"))
    return found is not None and (int(found[1]), int(found[2])) >= (major, minor)
