"""One step of teacher and student on a pipeline's ranks, pass by pass: what starts when, under three ways to order them.

Each rank works off a list of passes in a fixed order; a pass starts when its rank is free and what it needs is there. Sending takes no
time: what is left is the schedule's own waiting. Times are in the unit of the works.
Legend: P ranks of the pipeline, V virtual stages of the student on each, M micro-batches of a step and a data-parallel rank.
Source: arXiv 2104.04473, section 2.2: 1F1B, and interleaved 1F1B in the order of megatron-core's schedule.
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
    """Time of one pass of a micro-batch through each stage's layers, in the order of the model's depth; stage n stands on rank n mod P."""

    teacher: tuple[float, ...]
    """[P] forward; their sum is one pass through the whole teacher."""
    forward: tuple[float, ...]
    """[P·V] of the student, with the loss on the last."""
    backward: tuple[float, ...]
    """[P·V]"""

    @property
    def ranks(self) -> int:
        return len(self.teacher)

    @property
    def virtual(self) -> int:
        return len(self.forward) // self.ranks

    def ideal(self, micro_batches: int) -> float:
        """All work of a step in equal parts on all ranks."""
        return micro_batches * (sum(self.teacher) + sum(self.forward) + sum(self.backward)) / self.ranks


class Pass(NamedTuple):
    """One model's pass of one micro-batch on one rank, through its chunk of this number."""

    kind: Kind
    rank: int
    micro_batch: int
    chunk: int = 0


class Span(NamedTuple):
    start: float
    end: float


Timeline = dict[Pass, Span]


def step_time(timeline: Timeline) -> float:
    return max(span.end for span in timeline.values())


def orders_of(virtual: int) -> tuple[Order, ...]:
    """Those that exist: with virtual stages both models are in no one schedule, since nobody offers it (ModelOpt asks for whole stages)."""
    return ORDERS if virtual == 1 else ORDERS[:2]


def simulate(works: StageWorks, micro_batches: int, order: Order) -> Timeline:
    """When every pass of a step runs.

    teacher_on_one_rank: every rank holds the whole teacher and runs it for its share of the micro-batches; teacher_pipelined: the teacher is
    split over the ranks, and runs ahead of the student; one_schedule: both models' activations travel together, a forward is one of each.
    Raises ValueError for no micro-batch, and with virtual stages for a number of them that P does not divide and for one_schedule.
    """
    _require(works, micro_batches, order)
    queues = [deque(_passes_of_rank(rank, works, micro_batches, order)) for rank in range(works.ranks)]
    done: Timeline = {}
    free = [0.0] * works.ranks
    while any(queues):
        before = len(done)
        for rank, queue in enumerate(queues):
            while queue and all(needed in done for needed in _needed(queue[0], works, order)):
                following = queue.popleft()
                start = max([free[rank], *(done[needed].end for needed in _needed(following, works, order))])
                free[rank] = start + _duration(following, works, order)
                done[following] = Span(start, free[rank])
        if len(done) == before:
            raise RuntimeError(f"every rank waits for another one: {', '.join(str(tuple(queue[0])) for queue in queues if queue)}")
    return done


def _require(works: StageWorks, micro_batches: int, order: Order) -> None:
    if micro_batches < 1:
        raise ValueError(f"{micro_batches} micro-batches")
    if order not in orders_of(works.virtual):
        raise ValueError(f"{order} with {works.virtual} virtual stages a rank")
    if works.virtual > 1 and micro_batches % works.ranks:
        raise ValueError(f"an interleaved schedule of {works.ranks} ranks takes a multiple of {works.ranks} micro-batches, not {micro_batches}")


def _passes_of_rank(rank: int, works: StageWorks, micro_batches: int, order: Order) -> Iterator[Pass]:
    if order == "teacher_on_one_rank":
        yield from (Pass("teacher", rank, number) for number in range(rank, micro_batches, works.ranks))
    if order == "teacher_pipelined":
        yield from (Pass("teacher", rank, number) for number in range(micro_batches))
    yield from passes_of_student(rank, works.ranks, works.virtual, micro_batches)


def passes_of_student(rank: int, ranks: int, virtual: int, micro_batches: int) -> Iterator[Pass]:
    """Interleaved: P micro-batches through one chunk, then through the next one; backward the chunks in reverse."""
    turns = [
        (number, chunk)
        for group in range(0, micro_batches, ranks)
        for chunk in range(virtual)
        for number in range(group, min(group + ranks, micro_batches))
    ]
    forward = [Pass("forward", rank, number, chunk) for number, chunk in turns]
    backward = [Pass("backward", rank, number, virtual - 1 - chunk) for number, chunk in turns]
    waiting = ranks - rank - 1
    ahead = min(waiting if virtual == 1 else 2 * waiting + (virtual - 1) * ranks, len(turns))
    yield from forward[:ahead]
    for following, ready in zip(forward[ahead:], backward, strict=False):
        yield following
        yield ready
    yield from backward[len(turns) - ahead :]


def _needed(wanted: Pass, works: StageWorks, order: Order) -> list[Pass]:
    """What other passes must have ended."""
    kind, rank, number, chunk = wanted
    ranks, stage = works.ranks, rank + chunk * works.ranks
    last = len(works.forward) - 1
    if kind == "backward":
        return [wanted._replace(kind="forward") if stage == last else _at(wanted, stage + 1, ranks)]
    if kind == "teacher":
        return [_at(wanted, rank - 1, ranks)] if rank and order == "teacher_pipelined" else []
    before = [_at(wanted, stage - 1, ranks)] if stage else []
    if stage == last and order != "one_schedule":  # the loss wants the teacher's last hidden states
        before.append(Pass("teacher", number % ranks if order == "teacher_on_one_rank" else ranks - 1, number))
    return before


def _at(wanted: Pass, stage: int, ranks: int) -> Pass:
    """The same micro-batch at another stage."""
    return wanted._replace(rank=stage % ranks, chunk=stage // ranks)


def _duration(wanted: Pass, works: StageWorks, order: Order) -> float:
    stage = wanted.rank + wanted.chunk * works.ranks
    if wanted.kind == "teacher":
        return sum(works.teacher) if order == "teacher_on_one_rank" else works.teacher[wanted.rank]
    if wanted.kind == "backward":
        return works.backward[stage]
    return works.forward[stage] + (works.teacher[wanted.rank] if order == "one_schedule" else 0.0)
