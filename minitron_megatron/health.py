"""What a machine is held against before a job spends hours on it: GPUs, their free memory, the disk, the links between the processes.

Each is asked for by a variable of the environment, which slurm/common.sh sets from the cluster file; what is not set is not looked at.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from minitron_megatron.errors import PlatformError
from minitron_megatron.parallel.world import World

GPUS, GPU_FREE, MEMORY_FREE = "MINITRON_HEALTH_GPUS", "MINITRON_HEALTH_GPU_FREE_GIB", "MINITRON_HEALTH_MEMORY_FREE_GIB"
DISK_FREE, ALL_REDUCE = "MINITRON_HEALTH_DISK_FREE_GB", "MINITRON_HEALTH_ALL_REDUCE_GB_PER_S"

MESSAGE_BYTES = 1 << 24
"""Of a measured all-reduce: large enough for the links' bandwidth to count, and not their latency."""

ROUNDS = 3


def require_health(folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Looks at this node, by itself; raises PlatformError that names it with everything that is wrong. folder: where the run writes."""
    problems = [*_gpu_problems(environment), *_memory_problems(environment), *_disk_problems(folder, environment)]
    if problems:
        raise PlatformError(f"health check of node {_node()}: {'; '.join(problems)}; take the node out (sbatch --exclude={_node()}), or mend it")


def require_links(world: World, environment: Mapping[str, str] = os.environ) -> None:
    """Times an all-reduce over every process; raises PlatformError, on all, where it is slower than asked."""
    wanted = _number(environment, ALL_REDUCE)
    if not wanted or world.size == 1:
        return
    found = all_reduce_bandwidth(world)
    if world.is_main:
        print(f"health: all-reduce over {world.size} processes {found:.2f} GB/s", flush=True)
    if found < wanted:
        raise PlatformError(
            f"health check: an all-reduce over {world.size} processes has {found:.2f} GB/s where {wanted:g} are asked for; look for a node whose "
            "network is down or another than the others' (NCCL_DEBUG=INFO names what NCCL chose), or lower all_reduce_gb_per_s in the cluster file"
        )


def all_reduce_bandwidth(world: World) -> float:
    """Bus bandwidth in GB/s, the same on every process: 2 (n − 1) / n of the bytes over the fastest of some rounds (nccl-tests' measure)."""
    message = torch.zeros(MESSAGE_BYTES // 4, device=world.platform.device)
    dist.all_reduce(message)  # the first one connects
    seconds = torch.tensor([min(_seconds_of_one(message, world) for _ in range(ROUNDS))], dtype=torch.float64, device=message.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return 2 * (world.size - 1) / world.size * MESSAGE_BYTES / float(seconds) / 1e9


def _seconds_of_one(message: torch.Tensor, world: World) -> float:
    world.platform.synchronize()
    began = time.monotonic()
    dist.all_reduce(message)
    world.platform.synchronize()
    return time.monotonic() - began


def _gpu_problems(environment: Mapping[str, str]) -> list[str]:
    wanted, free_gib = int(_number(environment, GPUS)), _number(environment, GPU_FREE)
    found = torch.cuda.device_count() if wanted else 0
    problems = [f"{found} GPUs, {wanted} are asked for"] if found < wanted else []
    return [*problems, *(_gpu_memory_problems(free_gib) if free_gib else [])]


def _gpu_memory_problems(wanted_gib: float) -> list[str]:
    try:
        all_free = _free_gib_of_gpus()
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not answer, the driver is to be mended: {error}"]
    return [
        f"GPU {gpu} has {free:.1f} GiB free, {wanted_gib:g} are asked for (nvidia-smi shows who holds it)"
        for gpu, free in enumerate(all_free)
        if free < wanted_gib
    ]


def _free_gib_of_gpus() -> list[float]:
    """By nvidia-smi: asking torch would make a context on every GPU, which the launcher would hold as long as the job runs."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [float(line) / 1024 for line in answer.split()]


def _memory_problems(environment: Mapping[str, str]) -> list[str]:
    wanted, free = _number(environment, MEMORY_FREE), psutil.virtual_memory().available / 2**30
    return [f"{free:.1f} GiB of memory are free, {wanted:g} are asked for"] if free < wanted else []


def _disk_problems(folder: Path, environment: Mapping[str, str]) -> list[str]:
    wanted = _number(environment, DISK_FREE)
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return [f"{existing} has {free:.1f} GB free, {wanted:g} are asked for"] if free < wanted else []


def _number(environment: Mapping[str, str], name: str) -> float:
    text = environment.get(name) or "0"
    try:
        return float(text)
    except ValueError:
        raise PlatformError(f"{name}={text} is no number; mend it in the cluster file") from None


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
