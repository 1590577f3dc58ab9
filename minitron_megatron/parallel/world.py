"""The processes of one stage: who this one is, and how they meet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from minitron_megatron.platform import Platform


@dataclass(frozen=True)
class World:
    """This process among those of the stage."""

    platform: Platform
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def rank_and_size() -> tuple[int, int]:
    """From the environment that torchrun and SLURM launches set; one process without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def distributed_world(platform: Platform, timeout_seconds: int = 1800) -> Iterator[World]:
    """Joins the processes that the launcher started; megatron-core wants a process group even for one."""
    rank, size = rank_and_size()
    if size == 1:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(platform.backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield World(platform, rank, size)
    finally:
        dist.destroy_process_group()
