"""How long a step takes on a named GPU: a roofline for each stage's passes, put together by the schedule's simulator.

A pass takes its matrix products at a share of the peak, plus what it moves through memory, plus its tensor-parallel collectives, none of it
overlapped with the rest; a lower bound would be too good, and these three do not overlap in megatron's forward pass. Sends between pipeline
stages are overlapped and left out, as in schedule/simulate.py; so are those of keys and values between context ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minitron_megatron.errors import PlatformError
from minitron_megatron.plan.activations import Pass
from minitron_megatron.plan.buffers import FP32
from minitron_megatron.plan.cluster import Cluster
from minitron_megatron.plan.gpus import REACHED, Accelerator, Shares
from minitron_megatron.plan.memory import TrainingPlan
from minitron_megatron.plan.split import Chunk
from minitron_megatron.plan.traffic import gradient_bytes, state_bytes, tensor_bytes_of_layer
from minitron_megatron.plan.weights import elements
from minitron_megatron.plan.work import NOTHING, Work, layer_backward, layer_forward, loss_work
from minitron_megatron.schedule.simulate import Order, StageWorks, simulate, step_time

ROUNDS = 4
"""Times the pipeline's ranks: of a step with more micro-batches, the rest takes as long each as those behind the first round."""


@dataclass(frozen=True)
class Machine:
    """A GPU among others, and the shares of its figures that are counted on."""

    gpu: Accelerator
    per_node: int
    network_bytes_per_second: float
    shares: Shares = REACHED

    @staticmethod
    def of(cluster: Cluster, shares: Shares) -> Machine:
        if cluster.gpu is None:
            raise PlatformError("a step's time needs a GPU; name one in the cluster file (gpu: H100-80GB)")
        return Machine(cluster.gpu, cluster.per_node, cluster.network_bytes_per_second, shares)

    def seconds(self, work: Work, sent: float = 0.0, *, span: int = 1) -> float:
        """sent: bytes that the rank sends, to ranks that are at most so many apart."""
        products = work.flops / (self.gpu.gpu.flops["bf16"] * self.shares.matrix)
        products += work.fp8_flops / (self.gpu.gpu.flops["fp8"] * self.shares.matrix_fp8) if work.fp8_flops else 0.0
        moved = work.bytes / (self.gpu.gpu.bytes_per_second * self.shares.memory)
        return products + moved + sent / self.link(span)

    def link(self, span: int) -> float:
        """Bytes a second of a rank in a group whose ranks are at most so many apart: within a node, or over the network."""
        within = span <= self.per_node
        return (self.gpu.nvlink_bytes_per_second if within else self.network_bytes_per_second) * self.shares.links


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    passes: float
    """Of teacher and student, waiting included."""
    waiting: float
    """Of these, in which a rank stands still on average."""
    reduction: float
    """Of gradients and weights over data-parallel ranks, as far as no pass hides it."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.passes + self.reduction + self.optimizer


def training_time(plan: TrainingPlan, machine: Machine) -> StepTime:
    split, number = plan.split, plan.micro_batches
    works, order, beside = _works(plan, machine)
    passes = beside + pipeline_seconds(works, number, order)
    largest = max(elements([weight for chunk in plan.weights(rank) for weight in chunk]) for rank in range(split.pipeline))
    sent = gradient_bytes(largest, plan.training, split.replicas, plan.weight_width)
    reduction = sent / machine.link(split.tensor * split.replicas)
    # what is reduced while the last micro-batch goes back, and gathered while the first one comes
    last, first = works.backward[0], sum(works.forward[:: split.pipeline])
    hidden = (last if plan.training.overlap_grad_reduce else 0.0) + (first if plan.training.overlap_param_gather else 0.0)
    exchanged = sum(state_bytes(plan, one) for one in plan.teachers) / machine.link(split.tensor * split.replicas * split.pipeline)
    waiting = passes - beside - works.ideal(number)
    return StepTime(passes + exchanged, waiting, max(0.0, reduction - hidden), _optimizer(plan, largest, machine))


def pipeline_seconds(works: StageWorks, number: int, order: Order) -> float:
    """Of one step with so many micro-batches."""
    if works.ranks == 1:
        return works.ideal(number)
    few = ROUNDS * works.ranks
    if number <= 2 * few:
        return step_time(simulate(works, number, order))
    some, more = (step_time(simulate(works, count, order)) for count in (few, 2 * few))
    # a start that the second round makes good would be taken off again and again: no step is shorter than its ideal
    return max(works.ideal(number), some + (more - some) * (number - few) / few)


def _works(plan: TrainingPlan, machine: Machine) -> tuple[StageWorks, Order, float]:
    """Seconds of each stage's passes; a teacher whose pipeline fits none of the simulator's orders is counted as seconds ahead of them."""
    forward = [chunk_seconds(plan.run, chunk, machine) for chunk in plan.split.all_chunks()]
    backward = [chunk_seconds(plan.run, chunk, machine, backward=True) for chunk in plan.split.all_chunks()]
    forward[-1] += machine.seconds(_losses(plan))
    ranks, beside = plan.split.pipeline, 0.0
    order: Order = "teacher_on_one_rank" if plan.teachers and ranks > 1 and _all_whole(plan) else "teacher_pipelined"
    before = [0.0] * ranks
    for one in plan.teachers:
        stages = [chunk_seconds(one.run, chunk, machine) for chunk in one.run.split.all_chunks()]
        share = plan.split.data / one.run.split.data  # of its micro-batches, for each of the student's
        if len(stages) in (1, ranks):
            # a whole teacher's pass is the sum of these entries, on one rank in turn: ranks × share of its passes fall to each rank
            before = [seconds + stages[stage % len(stages)] * share for stage, seconds in enumerate(before)]
        else:
            beside += max(stages) * (plan.micro_batches * share + len(stages) - 1)
    return StageWorks(tuple(before), tuple(forward), tuple(backward)), order, beside


def _all_whole(plan: TrainingPlan) -> bool:
    return all(one.run.split.pipeline == 1 for one in plan.teachers)


def _losses(plan: TrainingPlan) -> Work:
    """The student's, and each teacher's logits on the student's ranks."""
    work = loss_work(plan.run)
    for one in plan.teachers:
        work += loss_work(replace(one.run, split=replace(one.run.split, tensor=plan.split.tensor)), products=1)
    return work


def chunk_seconds(run: Pass, chunk: Chunk, machine: Machine, *, backward: bool = False) -> float:
    """One micro-batch through the layers of a chunk."""
    work, sent = NOTHING, 0.0
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[run.recompute] * tensor_bytes_of_layer(run, backward=False)
    for layer in chunk.layers:
        work += layer_backward(run, layer) if backward else layer_forward(run, layer)
        sent += tensor_bytes_of_layer(run, backward=backward) + (again if backward else 0.0)
    return machine.seconds(work, sent, span=run.split.tensor)


def _optimizer(plan: TrainingPlan, largest: int, machine: Machine) -> float:
    """Reads gradients, main weights and both moments, writes the last three and the weights: of this rank's part."""
    ranks = plan.split.replicas if plan.training.distributed_optimizer else 1
    moved = largest / ranks * (7 * FP32 + plan.run.width) + largest * 2 * FP32  # gradients are zeroed, and their norm is taken
    return machine.seconds(Work(0.0, moved))
