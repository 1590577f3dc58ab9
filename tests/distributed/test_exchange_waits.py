"""Ranks that only give states away do not wait for those that take them."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from minitron_megatron.config.parallel import TeacherParallel
from minitron_megatron.distill.exchange import Exchange, Route, StateShape
from minitron_megatron.distill.handover import HandoverStore, Held
from minitron_megatron.parallel.layout import global_layout, teacher_layout
from minitron_megatron.parallel.world import World

from .pool import Pool
from .tiny import PP2

GROUPS = [(number,) for number in range(4)]
"""Dealt round: the teacher, whole on each rank, makes the even ones on rank 0."""
SHAPE = StateShape(sequence=5, samples=1, hidden=3, dtype=torch.float32)


def state(number: int, step: int) -> torch.Tensor:
    return torch.full((5, 1, 3), float(10 * step + number))


def hand_over(world: World, steps: int) -> list[list[float]]:
    """Rank 1, the student's last stage, takes nothing before rank 0 says that it has given all of a step."""
    student = global_layout(PP2, world)
    teacher = teacher_layout(TeacherParallel(), world, student)
    group = dist.new_group(timeout=timedelta(seconds=5))  # of a rank that waits
    exchange, found, token = Exchange(teacher, student, group, torch.device("cpu")), [], torch.zeros(1)
    for step in range(steps):
        made, wanted = (HandoverStore(1e9, torch.device("cpu")) for _ in range(2))
        for number in range(world.rank, len(GROUPS), 2):
            made.put(("final", GROUPS[number]), Held(state(number, step), sharded=False))
        if world.rank == 1:
            dist.recv(token, 0)
        exchange.run([Route("final", 0, 1)], GROUPS, made, wanted, SHAPE)
        if world.rank == 0:
            dist.send(token, 1)
        else:
            found.append([float(wanted.take(("final", ids)).states.unique()) for ids in GROUPS])
        world.barrier()  # as the sums of a step: no process goes before all have what they wanted
    return found


def test_a_rank_that_only_gives_its_teachers_states_goes_on_with_its_student(pool: Pool) -> None:
    """Where it waits for the taker, both wait for ever; the group's 5 seconds end that."""
    _, found = pool.run(hand_over, 2, processes=2, timeout_seconds=40)
    assert found == [[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]]
