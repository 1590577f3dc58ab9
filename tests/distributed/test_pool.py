"""The pool itself: results in rank order, fresh groups, and failures that are told at once instead of hanging."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.parallel.world import World

from .pool import Pool, WorkerError


def rank_sum(world: World, factor: int) -> tuple[int, float]:
    total = torch.tensor(float(world.rank * factor))
    dist.all_reduce(total)
    return world.rank, float(total)


def one_rank_raises(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the reef is near")
    dist.barrier()


def one_rank_dies(world: World) -> None:
    if world.rank == 1:
        os._exit(3)
    dist.barrier()


def one_rank_stays_away(world: World) -> None:
    if world.rank == 0:
        dist.all_reduce(torch.zeros(1))


def test_each_call_has_a_group_of_its_own_size(pool: Pool) -> None:
    assert pool.run(rank_sum, 10, processes=3) == [(0, 30.0), (1, 30.0), (2, 30.0)]
    assert pool.run(rank_sum, 1, processes=2) == [(0, 1.0), (1, 1.0)]
    assert pool.run(rank_sum, 1, processes=1) == [(0, 0.0)]


@pytest.mark.parametrize(("function", "told"), [(one_rank_raises, "rank 1 raised(.|\n)*the reef is near"), (one_rank_dies, "rank 1 died")])
def test_a_failure_of_one_rank_is_told_while_the_others_wait_in_a_collective(pool: Pool, function: object, told: str) -> None:
    pool.run(rank_sum, 1, processes=2)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=told):
        pool.run(function, processes=2)  # type: ignore[arg-type]
    assert time.monotonic() - started < 10  # the group's own timeout is 90 s
    assert pool.run(rank_sum, 1, processes=2) == [(0, 1.0), (1, 1.0)]  # the pool is whole again


def test_ranks_that_hang_are_named_with_their_stacks(pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"no answer in time from ranks \[0, 1\](.|\n)*one_rank_stays_away"):
        pool.run(one_rank_stays_away, processes=2, timeout_seconds=3)
