"""All teachers of a distillation: which they are, their layouts, and the one that is corrected while it teaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.data.batches import Batch, MicroBatches
from minitron_megatron.distill.teacher import Teacher, TeacherStates, Wanted, load_teacher
from minitron_megatron.errors import ArchitectureError
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.parallel.layout import teacher_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.training.given import Given, given_teachers
from minitron_megatron.training.job import Job, training_bytes
from minitron_megatron.training.losses.target import WeightedTarget
from minitron_megatron.training.snapshots import Snapshots
from minitron_megatron.training.training_checkpoint import Progress, teachers_of_checkpoints


@dataclass
class Beside:
    """The source as teacher, in the newest state that a correction running beside the distillation has published."""

    snapshots: Snapshots
    source: Artifact
    training: Path
    """Of the training checkpoints, which name the teacher that they continue with."""
    world: World
    identity: str = ""

    def start(self, before: Progress) -> Path:
        """The checkpoint to begin with: the one that an earlier start would have gone on with, or the newest; the source where there is none."""
        self.identity = self.world.from_main(before.teacher or self._newest())
        return self._checkpoint()

    def newer(self) -> Path | None:
        """The checkpoint of a newer teacher, where there is one; every process calls this and gets the same."""
        newest = self.world.from_main(self._newest())
        if newest == self.identity:
            return None
        self.identity = newest
        return self._checkpoint()

    def _newest(self) -> str:
        """Marked at once, as are those that a training checkpoint names: the correction must not drop them. On the main process."""
        if not self.world.is_main:
            return ""
        # without any, as after somebody cleaned up, the teacher that is in memory stays: the source is where a correction began
        newest = self.snapshots.newest() or self.identity or self.source.id
        self.snapshots.mark({newest, self.identity} | teachers_of_checkpoints(self.training))
        return newest

    def _checkpoint(self) -> Path:
        return self.source.path / "checkpoint" if self.identity == self.source.id else self.snapshots.checkpoint(self.identity)


@dataclass
class Teachers:
    """Each runs its forward-only schedule ahead of the student's; losses are summed with their weights, see WeightedTarget."""

    members: list[Teacher]
    corrected: list[Teacher] = field(default_factory=list)
    """Those that change."""
    beside: Beside | None = None
    first_is_source: bool = True
    """Whether the model that the student was cut out of is the first."""

    @property
    def identity(self) -> str:
        return self.beside.identity if self.beside else ""

    def states(self, groups: MicroBatches, load: Callable[[tuple[int, ...]], Batch], wanted: Sequence[Wanted] = ()) -> AllStates:
        """wanted: inner states, of the first teacher."""
        return AllStates([member.states(groups, load, () if number else wanted) for number, member in enumerate(self.members)])

    def renew(self) -> None:
        """Weights of the newest corrected teacher, in place; every process calls this."""
        checkpoint = self.beside.newer() if self.beside else None
        if checkpoint:
            for member in self.corrected:
                member.take_weights(checkpoint)

    def describe(self) -> str:
        """Layouts, each once."""
        return " and ".join(dict.fromkeys(member.model.layout.describe() for member in self.members))


class AllStates:
    """What all teachers made of one global batch."""

    def __init__(self, of_members: list[TeacherStates]) -> None:
        self._of_members = of_members

    def targets(self, batch: Batch) -> list[WeightedTarget]:
        return [target for states in self._of_members for target in states.targets(batch)]

    def own_part(self, wanted: Wanted, batch: Batch) -> Tensor:
        """Of the first teacher."""
        return self._of_members[0].own_part(wanted, batch)


def load_teachers(job: Job, inputs: Mapping[str, Artifact], student: Architecture, before: Progress) -> Teachers:
    """Builds and fills them, each in its own layout beside the student's. Raises ArchitectureError for another vocabulary."""
    recipe, world = job.recipe, job.world
    source, beside = inputs.get("correct", inputs["import"]), None
    checkpoint = source.path / "checkpoint"
    if recipe.correct_beside:
        beside = Beside(Snapshots.of(recipe, source, inputs["data"]), source, job.folder / "training", world)
        checkpoint = beside.start(before)
    teachers = given_teachers(recipe, inputs, checkpoint)
    for teacher in teachers:
        refuse_other_vocabulary(teacher.architecture, student)
    layouts = [_layout(job, teacher, student, teachers) for teacher in teachers]
    budget = recipe.distill.handover_device_gib * 2**30 / len(teachers)
    members = [
        load_teacher(
            MegatronSource(given.checkpoint, given.architecture),
            given.checkpoint,
            teacher_layout(own, world, job.layout),
            job.layout,
            world.platform,
            torch_dtype(recipe.precision_of_teacher),
            budget_bytes=budget,
            share=given.weight,
            fp8=recipe.fp8.of_teacher if recipe.fp8 else None,
        )
        for given, own in zip(teachers, layouts, strict=True)
    ]
    corrected = [member for member, given in zip(members, teachers, strict=True) if given.is_source and beside]
    return Teachers(members, corrected, beside if corrected else None, first_is_source=teachers[0].is_source)


def refuse_other_vocabulary(teacher: Architecture, student: Architecture) -> None:
    """The KL compares distributions over one vocabulary."""
    if teacher.vocab != student.vocab:
        raise ArchitectureError(
            f"the student's vocabulary of {student.vocab} is not the teacher's of {teacher.vocab}; distil from a teacher with the same tokenizer"
        )


def _layout(job: Job, teacher: Given, student: Architecture, teachers: list[Given]) -> TeacherParallel:
    others = [other.architecture for other in teachers if other is not teacher]
    frozen = torch_dtype(job.recipe.precision_of_teacher)
    return settle_teacher(job.recipe.parallel, teacher.architecture, student, job.dtype, job.world, others=others, frozen=frozen)


def settle_teacher(
    parallel: Parallel,
    teacher: Architecture,
    student: Architecture,
    dtype: torch.dtype,
    world: World,
    *,
    others: Sequence[Architecture] = (),
    frozen: torch.dtype | None = None,
) -> TeacherParallel:
    """The teacher's layout; `auto` is one without a pipeline, and so without its bubbles, where all models take at most half of the
    memory that is free on every process. It changes no bit of the teacher's states. A teacher with experts has the student's sizes, because
    only megatron's global groups have some for experts. dtype: the student's; frozen: the teachers', by default the same. others: further
    teachers."""
    if isinstance(parallel.teacher, TeacherParallel):
        return parallel.teacher
    as_student = TeacherParallel(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=parallel.sequence)
    if parallel.teacher == "student" or parallel.pipeline == 1 or teacher.experts:
        return as_student
    free = torch.tensor(world.platform.free_memory_bytes(), device=world.platform.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    teachers = (frozen or dtype).itemsize * sum(map(parameter_count, (teacher, *others))) / parallel.tensor
    needed = teachers + training_bytes(student, dtype, 1) / (parallel.tensor * parallel.pipeline)
    return as_student.model_copy(update={"pipeline": 1}) if needed <= int(free) / 2 else as_student
