"""Passes of one micro-batch measured stage by stage, and the step that the simulator of `minitron plan` makes of them.

Legend: S sequence, B samples of a micro-batch, D, E hidden of student and teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from step_plain import Trained
from step_shapes import MICRO_BATCHES
from torch import Tensor

from minitron_megatron.data.batches import Batch
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.schedule.simulate import Order, StageWorks, simulate, step_time
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.losses.target import WeightedTarget

REPEATS = 5


class Passes(NamedTuple):
    """Seconds on this rank: of the teacher, of each chunk of the student, and of the optimizer's step."""

    order: Order
    teacher: float
    forward: list[float]
    backward: list[float]
    optimizer: float


@dataclass
class SomeStates:
    """Stands for a teacher's states of any micro-batch."""

    target: WeightedTarget

    def targets(self, batch: Batch) -> list[WeightedTarget]:
        return [self.target]


def simulated(passes: Passes, layout: Layout) -> dict[str, Any]:
    """Seconds of a step over all ranks of the pipeline, behind it the slowest rank's optimizer; and the passes that it is made of."""
    found: list[Any] = [None] * layout.pipeline
    dist.all_gather_object(found, passes, group=layout.groups.pp)
    works = StageWorks(
        tuple(rank.teacher for rank in found),
        tuple(rank.forward[chunk] for chunk in range(layout.virtual) for rank in found),
        tuple(rank.backward[chunk] for chunk in range(layout.virtual) for rank in found),
    )
    seconds = step_time(simulate(works, MICRO_BATCHES, passes.order)) + max(rank.optimizer for rank in found)
    return {"seconds": seconds, "order": passes.order, "optimizer": passes.optimizer, **asdict(works)}


def of_distillation(loop: TrainingLoop, batch: Batch) -> Passes:
    """The loop's own teacher, student and loss."""
    student, [frozen] = loop.student, loop.teachers.members
    samples, sequence = batch.tokens_BS.shape
    states_SBE = torch.randn(sequence, samples, frozen.architecture.hidden)

    @torch.no_grad()
    def ahead() -> None:
        [chunk] = frozen.model.chunks
        chunk.set_input_tensor([None if frozen.model.layout.is_first_stage else states_SBE])
        chunk(batch.tokens_BS, batch.position_ids_BS, None)

    def loss(hidden_SBD: Tensor) -> Tensor:
        target = WeightedTarget(states_SBE.flatten(0, 1), frozen.output_weight_vE)
        return student.loss(SomeStates(target), hidden_SBD, batch)[0]

    found = [_chunk(chunk, batch, student.model.config.hidden_size, loss, {}) for chunk in student.wrapped]
    stages, own = student.model.layout.pipeline, frozen.model.layout.pipeline
    order: Order = "teacher_on_one_rank" if own < stages else "teacher_pipelined"
    teacher = _seconds(ahead) * own / stages  # of a whole one each rank counts an equal part
    return Passes(order, teacher, *map(list, zip(*found, strict=True)), _seconds(student.optimizer.step))


def of_trained(trained: Trained, batch: Batch, width: int) -> Passes:
    """Of a model that carries its teacher along; width: of what travels between stages."""

    def loss(losses_BS: Tensor) -> Tensor:
        return trained.loss(batch, losses_BS)[0]

    found = [_chunk(chunk, batch, width, loss, {"labels": batch.labels_BS}) for chunk in trained.wrapped]
    return Passes("one_schedule", 0.0, *map(list, zip(*found, strict=True)), _seconds(trained.optimizer.step))


def _chunk(wrapped: Any, batch: Batch, width: int, loss: Callable[[Tensor], Tensor], more: dict[str, Tensor]) -> tuple[float, float]:
    """Median seconds of forward, with the loss where this is the last stage, and of backward."""
    chunk, (samples, sequence) = wrapped.module, batch.tokens_BS.shape
    times: list[Sequence[float]] = []
    for _ in range(REPEATS):
        entering_SBD = torch.randn(sequence, samples, width, requires_grad=True)
        chunk.set_input_tensor([None if chunk.pre_process else entering_SBD])
        began = time.monotonic()
        output = wrapped(batch.tokens_BS, batch.position_ids_BS, None, **more)
        result = loss(output) if chunk.post_process else output
        between = time.monotonic()
        result.backward(torch.ones_like(result))
        times.append((between - began, time.monotonic() - between))
    forward, backward = zip(*times, strict=True)
    return median(forward), median(backward)


def _seconds(step: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.monotonic()
        step()
        times.append(time.monotonic() - began)
    return median(times)
