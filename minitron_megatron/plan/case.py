"""A recipe on a cluster: what every part of a plan asks for, settled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.config.checks.teachers import teacher_architectures
from minitron_megatron.config.distill import Distill, TrainingRun
from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.config.parallel import TeacherParallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.distill.hidden.map import hidden_terms, layer_pairs, projection_holders, stage_of
from minitron_megatron.parallel.split import EndWork, distillation_work, hidden_state_work
from minitron_megatron.plan.activations import Kernels, Pass
from minitron_megatron.plan.cluster import Cluster
from minitron_megatron.plan.fp8 import require_scalings
from minitron_megatron.plan.gpus import GIB, KEPT_FREE_GIB, REACHED, Shares
from minitron_megatron.plan.memory import TeacherPlan, TrainingPlan
from minitron_megatron.plan.split import Split, split_of, teacher_split
from minitron_megatron.plan.time import Machine

WIDTH = {"fp32": 4, "bf16": 2}


class HiddenPlan(NamedTuple):
    """What hidden-state losses add."""

    states: int = 1
    """Of the first teacher for each micro-batch, the final one included."""
    projections: tuple[tuple[int, ...], ...] = ()
    """Elements of those on each (virtual) stage."""
    compared: tuple[int, ...] = ()
    """States on each stage."""


@dataclass(frozen=True)
class Case:
    """One step of a recipe: source, target and where it is to run."""

    recipe: Recipe
    source: Architecture
    target: Architecture
    cluster: Cluster
    shares: Shares = REACHED

    @cached_property
    def kernels(self) -> Kernels:
        return "cuda" if self.cluster.gpu and self.recipe.platform != "cpu" else "cpu"

    @property
    def precision(self) -> str:
        """auto: bf16 on a GPU; on a CPU, which may or may not multiply in it, fp32."""
        named = self.recipe.precision
        return named if named != "auto" else ("bf16" if self.kernels == "cuda" else "fp32")

    @property
    def width(self) -> int:
        return WIDTH[self.precision]

    @property
    def in_fp8(self) -> bool:
        """Whether any model of it is."""
        fp8 = self.recipe.fp8
        return fp8 is not None and not fp8.emulated

    @cached_property
    def teachers(self) -> list[Architecture]:
        """Whose logits the distillation makes."""
        return [] if self.recipe.distill.teacher_outputs == "stored" else teacher_architectures(self.recipe, self.source)

    @cached_property
    def machine(self) -> Machine | None:
        """None where no time is known: without a GPU, and for fp32, whose peak no data sheet here has."""
        if self.kernels == "cpu" or self.precision == "fp32":
            return None
        if self.recipe.fp8 and self.cluster.gpu and self.in_fp8:
            require_scalings(self.recipe.fp8, self.cluster.gpu)
        return Machine.of(self.cluster, self.shares)

    @property
    def memory_limit(self) -> int | None:
        """Bytes of a GPU that a plan may use."""
        gpu = self.cluster.gpu
        return int((gpu.memory_gib - KEPT_FREE_GIB) * GIB) if gpu and self.kernels == "cuda" else None

    def split(self, arch: Architecture, ends: EndWork) -> Split:
        return split_of(arch, self.recipe.parallel, ends)

    def forward(self, arch: Architecture, samples: int, sequence: int, ends: EndWork) -> Pass:
        """Of a stage that does not train: context ranks are data-parallel ranks there."""
        split = split_of(arch, self.recipe.parallel.without_context(), ends)
        return Pass(split, samples, sequence, self.width, "none", self.kernels)

    def training(self, arch: Architecture, settings: TrainingRun) -> TrainingPlan:
        """Of a stage that trains; only the distillation has teachers."""
        teachers = self.teachers if isinstance(settings, Distill) else []
        split = self.split(arch, distillation_work(arch, *teachers))
        recompute, fp8 = self.recipe.training.recompute, self.recipe.fp8
        run = Pass(split, settings.micro_batch, settings.sequence_length, self.width, recompute, self.kernels, _real(fp8.of_student if fp8 else None))
        hidden = self._hidden(split, teachers, settings)
        planned = tuple(self._teacher(teacher, split, settings, hidden.states if number == 0 else 1) for number, teacher in enumerate(teachers))
        budget = int(settings.handover_device_gib * GIB) if isinstance(settings, Distill) else 0
        return TrainingPlan(settings, self.recipe.training, run, planned, budget, hidden.projections, hidden.compared)

    def taught(self, run: Pass) -> Pass:
        """As the frozen teacher computes."""
        fp8, own = self.recipe.fp8, self.recipe.teacher_precision
        return replace(run, width=self.width if own == "same" else WIDTH[own], fp8=_real(fp8.of_teacher if fp8 else None))

    def _teacher(self, arch: Architecture, student: Split, settings: TrainingRun, states: int) -> TeacherPlan:
        own = self.teacher_layout(arch)
        split = teacher_split(arch, own, self.recipe.parallel, hidden_state_work(arch))
        run = self.taught(Pass(split, settings.micro_batch, settings.sequence_length, self.width, "none", self.kernels))
        shared = arch.tied_embeddings and own.tensor == student.tensor and own.pipeline == 1
        return TeacherPlan(run, states, shared)

    def teacher_layout(self, teacher: Architecture) -> TeacherParallel:
        """distill/teachers.py, settle_teacher, with the whole GPU as what is free; on a CPU every model is taken to fit."""
        parallel = self.recipe.parallel
        if isinstance(parallel.teacher, TeacherParallel):
            return parallel.teacher
        rule = parallel.without_virtual_stages().layers_per_stage
        as_student = TeacherParallel(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=parallel.sequence)
        if not isinstance(rule, str) and sum(rule) == teacher.layers:
            as_student = as_student.model_copy(update={"layers_per_stage": rule})
        if parallel.teacher == "student" or parallel.pipeline == 1 or teacher.experts:
            return as_student
        width = self.width if self.recipe.teacher_precision == "same" else WIDTH[self.recipe.teacher_precision]
        frozen = width * sum(map(parameter_count, self.teachers)) / parallel.tensor
        per_parameter = self.width + 8 + (4 if self.width < 4 else 0)
        needed = frozen + per_parameter * parameter_count(self.target) / (parallel.tensor * parallel.pipeline)
        limit = self.memory_limit
        return as_student.model_copy(update={"pipeline": 1, "layers_per_stage": "cost"}) if limit is None or needed <= limit / 2 else as_student

    def _hidden(self, split: Split, teachers: Sequence[Architecture], settings: TrainingRun) -> HiddenPlan:
        hidden = settings.hidden if isinstance(settings, Distill) else None
        if hidden is None or not teachers:
            return HiddenPlan()
        pairs = layer_pairs(hidden, teachers[0].layers, split.arch.layers, self._kept_layers())
        terms, stages = hidden_terms(hidden, pairs), range(len(split.layers))
        holders, elements = projection_holders(terms, split.layers), teachers[0].hidden * split.arch.hidden
        where = [stage_of(term.student, split.layers) for term in terms]
        return HiddenPlan(
            1 + len({term.teacher for term in terms}),
            tuple(tuple(elements for held in holders.values() if stage in held) for stage in stages),
            tuple(where.count(stage) for stage in stages),
        )

    def _kept_layers(self) -> list[int]:
        """The scores decide which; where they have not yet, a block ahead of the last layer stands for what they drop."""
        dropped = self.recipe.prune.drop_layers
        if dropped is None:
            dropped = list(range(self.target.layers - 1, self.source.layers - 1))
        return [layer for layer in range(self.source.layers) if layer not in dropped]


def _real(fp8: ModelFp8 | None) -> ModelFp8 | None:
    """None for an emulation, whose tensors are the recipe's precision."""
    return None if fp8 is None or fp8.emulated else fp8
