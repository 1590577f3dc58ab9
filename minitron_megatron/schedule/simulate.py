"""One step of teacher and student on a pipeline's ranks, pass by pass: what starts when, under three ways to order them.

Each rank works off a list of passes in a fixed order; a pass starts when its rank is free and what it needs is there. Sending takes no
time: what is left is the schedule's own waiting. Times are in the unit of the works.
Legend: P ranks of the pipeline, M micro-batches of a step and a data-parallel rank.
Source: 1F1B as in arXiv 2104.04473, section 2.2 (the interleaved schedule is left out).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["teacher", "forward", "backward"]
Order = Literal["teacher_on_one_rank", "teacher_pipelined", "one_schedule"]
ORDERS: tuple[Order, ...] = ("teacher_on_one_rank", "teacher_pipelined", "one_schedule")


@dataclass(frozen=True)
class StageWorks:
    """[P] time of one pass of a micro-batch through each rank's layers."""

    teacher: tuple[float, ...]
    """Forward; their sum is one pass through the whole teacher."""
    forward: tuple[float, ...]
    """Of the student, with the loss on the last."""
    backward: tuple[float, ...]

    @property
    def ranks(self) -> int:
        return len(self.forward)

    def ideal(self, micro_batches: int) -> float:
        """All work of a step in equal parts on all ranks."""
        return micro_batches * (sum(self.teacher) + sum(self.forward) + sum(self.backward)) / self.ranks


class Pass(NamedTuple):
    """One model's pass of one micro-batch on one rank."""

    kind: Kind
    rank: int
    micro_batch: int


class Span(NamedTuple):
    start: float
    end: float


Timeline = dict[Pass, Span]


def step_time(timeline: Timeline) -> float:
    return max(span.end for span in timeline.values())


def simulate(works: StageWorks, micro_batches: int, order: Order) -> Timeline:
    """When every pass of a step runs. Raises ValueError for no micro-batch.

    teacher_on_one_rank: every rank holds the whole teacher and runs it for its share of the micro-batches; teacher_pipelined: the teacher is
    split as the student is, and runs ahead of it; one_schedule: both models' activations travel together, a forward is one of each.
    """
    if micro_batches < 1:
        raise ValueError(f"{micro_batches} micro-batches")
    queues = [deque(_passes_of_rank(rank, works.ranks, micro_batches, order)) for rank in range(works.ranks)]
    done: Timeline = {}
    free = [0.0] * works.ranks
    while any(queues):
        for rank, queue in enumerate(queues):
            while queue and all(needed in done for needed in _needed(queue[0], works.ranks, order)):
                following = queue.popleft()
                start = max([free[rank], *(done[needed].end for needed in _needed(following, works.ranks, order))])
                free[rank] = start + _duration(following, works, order)
                done[following] = Span(start, free[rank])
    return done


def _passes_of_rank(rank: int, ranks: int, micro_batches: int, order: Order) -> Iterator[Pass]:
    if order == "teacher_on_one_rank":
        yield from (Pass("teacher", rank, number) for number in range(rank, micro_batches, ranks))
    if order == "teacher_pipelined":
        yield from (Pass("teacher", rank, number) for number in range(micro_batches))
    yield from _one_forward_one_backward(rank, ranks, micro_batches)


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> Iterator[Pass]:
    ahead = min(ranks - rank - 1, micro_batches)
    yield from (Pass("forward", rank, number) for number in range(ahead))
    for number in range(micro_batches - ahead):
        yield Pass("forward", rank, ahead + number)
        yield Pass("backward", rank, number)
    yield from (Pass("backward", rank, number) for number in range(micro_batches - ahead, micro_batches))


def _needed(wanted: Pass, ranks: int, order: Order) -> list[Pass]:
    """What other passes must have ended."""
    kind, rank, number = wanted
    last = ranks - 1
    if kind == "backward":
        return [Pass("forward", rank, number) if rank == last else Pass("backward", rank + 1, number)]
    before = [Pass(kind, rank - 1, number)] if rank and not (kind == "teacher" and order == "teacher_on_one_rank") else []
    if kind == "forward" and rank == last and order != "one_schedule":  # the loss wants the teacher's last hidden states
        before.append(Pass("teacher", number % ranks if order == "teacher_on_one_rank" else last, number))
    return before


def _duration(wanted: Pass, works: StageWorks, order: Order) -> float:
    if wanted.kind == "teacher":
        return sum(works.teacher) if order == "teacher_on_one_rank" else works.teacher[wanted.rank]
    if wanted.kind == "backward":
        return works.backward[wanted.rank]
    return works.forward[wanted.rank] + (works.teacher[wanted.rank] if order == "one_schedule" else 0.0)
