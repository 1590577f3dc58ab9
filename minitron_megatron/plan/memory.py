"""Memory of one rank in training: what lies there throughout, and the three moments of a step that may be the fullest.

Legend: B_t bytes of a teacher's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minitron_megatron.config.distill import Training, TrainingRun
from minitron_megatron.plan.activations import Pass, backward_beside, forward_beside, kept_by_chunk
from minitron_megatron.plan.buffers import trained_bytes
from minitron_megatron.plan.fp8 import cast_bytes, frozen_bytes, is_fp8
from minitron_megatron.plan.loss import LossMemory, handover_bytes, loss_memory
from minitron_megatron.plan.order import in_flight
from minitron_megatron.plan.split import Split
from minitron_megatron.plan.weights import Weight, chunk_weights

BATCH_BYTES = 8 + 8 + 8 + 4
"""Of a token of the step: its id, its label, its position, its weight in the loss."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what they are for; host: of pinned host memory besides."""

    parts: dict[str, int]
    host: int = 0
    where: str = ""
    fullest: str = ""
    """The moment of a step that needs most."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class TeacherPlan:
    """One frozen teacher in its own layout."""

    run: Pass
    states: int = 1
    """For each micro-batch: the final one, and those that hidden-state losses compare."""
    output_here: bool = False
    """Whether its tied embedding serves as the output weight too."""


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that one process of a training stage holds."""

    settings: TrainingRun
    training: Training
    run: Pass
    teachers: tuple[TeacherPlan, ...] = ()
    handover_device_bytes: int = 0
    projections: tuple[tuple[int, ...], ...] = field(default=())
    """Elements of the learned projections of hidden-state losses on each (virtual) stage."""
    compared: tuple[int, ...] = ()
    """States that hidden-state losses compare on each (virtual) stage."""

    @property
    def split(self) -> Split:
        return self.run.split

    @property
    def micro_batches(self) -> int:
        """Of a step, on one data-parallel rank."""
        return self.settings.global_batch // (self.settings.micro_batch * self.split.data)

    def weights(self, rank: int) -> list[list[Weight]]:
        """Of the trained model on a pipeline rank, chunk by chunk."""
        stages = range(rank, len(self.split.layers), self.split.pipeline)
        learned = [self.projections[stage] if self.projections else () for stage in stages]
        chunks = zip(self.split.chunks(rank), learned, strict=True)
        return [[*chunk_weights(self.split, chunk), *map(Weight, more)] for chunk, more in chunks]

    @property
    def weight_width(self) -> float:
        """Bytes of a weight on average, as data-parallel ranks gather it."""
        fp8, layers = self.run.fp8, self.split.arch.layers
        every = [weight for rank in range(self.split.pipeline) for chunk in self.weights(rank) for weight in chunk]
        eight = sum(weight.elements for weight in every if fp8 and fp8.weights and is_fp8(weight, fp8, layers))
        return self.run.width - (self.run.width - 1) * eight / sum(weight.elements for weight in every)

    def kept(self, rank: int) -> list[int]:
        """Bytes that each chunk of a pipeline rank keeps of a micro-batch; a compared state is kept once more as the teacher's channels."""
        found, teacher = [], self.teachers[0].run.split.arch.hidden if self.teachers else 0
        for number, chunk in enumerate(self.split.chunks(rank)):
            terms = self.compared[rank + number * self.split.pipeline] if self.compared else 0
            found.append(kept_by_chunk(self.run, chunk) + terms * self.run.state // self.split.arch.hidden * teacher)
        return found


def training_memory(plan: TrainingPlan, rank: int, *, data_rank: int = 0) -> Memory:
    """Of a pipeline rank of the student: the fullest moment of a step once the optimizer's state exists."""
    chunks, is_last = plan.split.chunks(rank), rank == plan.split.pipeline - 1
    lasting = _lasting(plan, rank, data_rank)
    loss = loss_memory(plan.settings, plan.run, teachers=len(plan.teachers)) if is_last else LossMemory(0, 0, 0, 0, 0, 0)
    if is_last:
        lasting["output gradient (fp32)"] = loss.weight_gradient
    states, host = _states(plan, rank)
    kept = [size + (loss.state_gradient if chunk.is_last else 0) for size, chunk in zip(plan.kept(rank), chunks, strict=True)]
    flying = in_flight(kept, rank=rank, ranks=plan.split.pipeline, micro_batches=plan.micro_batches)
    lasting["output gradient (fp32)"] = lasting.get("output gradient (fp32)", 0) * max(flying.losses, 1)
    widest = max((plan.split.arch.ffn_width(layer) for chunk in chunks for layer in chunk.layers), default=0)
    teacher = max((forward_beside(one.run, one.run.split.arch.ffn) for one in plan.teachers), default=0)
    moments = {
        "teacher's passes": {"teacher's states": states, "working memory": teacher},
        "loss": {"activations": flying.bytes, "teacher's states": states, "logits of a chunk and losses": loss.chunk, "working memory": loss.states},
        "backward": {
            "activations": flying.bytes,
            "teacher's states": states,
            "working memory": max(backward_beside(plan.run, widest), loss.delivery),
        },
    }
    if not is_last:
        del moments["loss"]
    if not plan.teachers:
        del moments["teacher's passes"]
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(_without_zeros(lasting | moments[fullest]), host, f"pipeline rank {rank}", fullest)


def _lasting(plan: TrainingPlan, rank: int, data_rank: int) -> dict[str, int]:
    run = plan.run
    own = trained_bytes(plan.split, plan.weights(rank), plan.training, stage=rank, data_rank=data_rank, width=run.width, fp8=run.fp8)
    # context ranks read whole samples, and keep their own part besides
    read = run.samples * run.sequence + (run.tokens if plan.split.context > 1 else 0)
    batches = plan.micro_batches * read * BATCH_BYTES
    gathered = max([run.whole_state] if plan.split.sequence else [0])
    return {
        "weights": own.weights,
        "gradients (fp32)": own.gradients,
        "optimizer": own.optimizer,
        "FP8 casts of weights": sum(cast_bytes(chunk, run.fp8, plan.split.arch.layers) for chunk in plan.weights(rank)),
        "teacher's weights": sum(teacher_weights(one.run, _teacher_rank(plan, one, rank)) for one in plan.teachers),
        "teacher's output weight": sum(output_weight(one, plan.split) for one in plan.teachers) if rank == plan.split.pipeline - 1 else 0,
        "tokens of the step": batches,
        "gathered sequence": gathered,
    }


def teacher_weights(run: Pass, rank: int) -> int:
    """Bytes of a frozen model without its output layer, on one of its pipeline ranks."""
    chunks = run.split.chunks(rank)
    return sum(frozen_bytes(chunk_weights(run.split, chunk, output=False), run.fp8, run.split.arch.layers, run.width) for chunk in chunks)


def output_weight(teacher: TeacherPlan, student: Split) -> int:
    """Bytes of the teacher's output weight in the student's partition of the vocabulary; none where it is the embedding's storage."""
    return 0 if teacher.output_here else student.vocabulary_rows * teacher.run.split.arch.hidden * teacher.run.width


def _teacher_rank(plan: TrainingPlan, teacher: TeacherPlan, rank: int) -> int:
    """The teacher's pipeline rank on the student's last, or first, data-parallel rank of this one: ranks are dealt in the same order."""
    of_stage = plan.split.tensor * plan.split.replicas
    per_stage = of_stage * plan.split.pipeline // teacher.run.split.pipeline
    return min(rank * of_stage // per_stage, teacher.run.split.pipeline - 1)


def _states(plan: TrainingPlan, rank: int) -> tuple[int, int]:
    """(device, host) bytes of the teachers' states of a step, where they are made or where they wait, whichever is more."""
    device = host = 0
    budget = plan.handover_device_bytes // max(len(plan.teachers), 1)
    for one in plan.teachers:
        all_there = states_of_rank(plan, one, rank)
        on_device = all_there if one.run.kernels == "cpu" else min(all_there, budget)
        device, host = device + on_device, host + all_there - on_device
    return device, host


def states_of_rank(plan: TrainingPlan, teacher: TeacherPlan, rank: int) -> int:
    """Bytes of one teacher's states of a step on a rank of this pipeline stage."""
    own, student = teacher.run.split, plan.split
    same = own.tensor == student.tensor
    total = plan.micro_batches * student.data  # of the step
    made = 0
    if _teacher_rank(plan, teacher, rank) == own.pipeline - 1:
        made = handover_bytes(teacher.run, -(-total // own.data), teacher.states, sharded=own.tensor if own.sequence else 1)
    wanted = 0
    if rank == student.pipeline - 1:
        sharded = (own.tensor if own.sequence else 1) if same and own.data == student.data else student.tensor
        wanted = handover_bytes(teacher.run, plan.micro_batches, teacher.states, sharded=sharded)
    return max(made, wanted)


def worst(memories: Sequence[Memory]) -> Memory:
    return max(memories, key=lambda memory: memory.total)


def _without_zeros(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
