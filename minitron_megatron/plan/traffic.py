"""Bytes that one rank sends in a step, and how long they take: tensor, pipeline and data-parallel groups, and the teacher's states on their way.

Ring collectives: an all-gather or a reduce-scatter of B bytes over t ranks sends (t − 1) / t · B from each, an all-reduce twice that. Tensor
parallelism has two all-reduces a layer in forward and two in backward; sequence parallelism makes each a reduce-scatter and an all-gather, and
gathers both inputs once more in backward (arXiv 2205.05198, section 4.2.2).
"""

from __future__ import annotations

from typing import NamedTuple

from minitron_megatron.config.distill import Training
from minitron_megatron.plan.activations import Pass
from minitron_megatron.plan.buffers import FP32
from minitron_megatron.plan.memory import TeacherPlan, TrainingPlan


class Traffic(NamedTuple):
    """Bytes that the busiest rank sends in a step."""

    tensor: float
    pipeline: float
    data: float
    states: float


def tensor_bytes_of_layer(run: Pass, *, backward: bool) -> float:
    """Of a micro-batch through one layer, forward or backward; recomputation is a forward more."""
    tensor, once = run.split.tensor, _ring(run.split.tensor, run.whole_state)
    if tensor == 1:
        return 0.0
    return once * (6 if backward and run.split.sequence else 4)


def pipeline_bytes(run: Pass) -> float:
    """A state, from one stage to the next."""
    return float(run.state) if run.split.pipeline > 1 else 0.0


def gradient_bytes(elements: int, training: Training, data: int, width: float) -> float:
    """Of a step: gradients are summed in fp32; with the distributed optimizer each rank gets its part, and updated weights are gathered."""
    if data == 1:
        return 0.0
    return _ring(data, elements * FP32) + _ring(data, elements * (width if training.distributed_optimizer else FP32))


def state_bytes(plan: TrainingPlan, teacher: TeacherPlan) -> float:
    """Teacher's states that leave a rank of its last stage, where the layouts differ."""
    own, student = teacher.run.split, plan.split
    if (own.tensor, own.pipeline, own.data) == (student.tensor, student.pipeline, student.data):
        return 0.0
    total = plan.micro_batches * student.data
    return -(-total // own.data) * teacher.states * teacher.run.whole_state / own.tensor


def training_traffic(plan: TrainingPlan, largest: int) -> Traffic:
    """largest: elements of the weights of the rank that has most."""
    run, split = plan.run, plan.split
    layers = max(sum(len(chunk.layers) for chunk in split.chunks(rank)) for rank in range(split.pipeline))
    again = tensor_bytes_of_layer(run, backward=False) * {"none": 0.0, "selective": 0.5, "full": 1.0}[run.recompute]
    of_layer = tensor_bytes_of_layer(run, backward=False) + tensor_bytes_of_layer(run, backward=True) + again
    of_teachers = 0.0
    for one in plan.teachers:
        own = one.run.split
        share = plan.micro_batches * split.data / own.data
        of_teachers += share * tensor_bytes_of_layer(one.run, backward=False) * max(own.layers)
    to_neighbours = 2 * split.virtual * pipeline_bytes(run) + sum(pipeline_bytes(one.run) for one in plan.teachers)
    return Traffic(
        plan.micro_batches * of_layer * layers + of_teachers,
        plan.micro_batches * to_neighbours,
        gradient_bytes(largest, plan.training, split.replicas, plan.weight_width),
        sum(state_bytes(plan, one) for one in plan.teachers),
    )


def _ring(ranks: int, size: float) -> float:
    return size * (ranks - 1) / ranks
