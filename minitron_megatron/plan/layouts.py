"""Every layout of so many processes for the distillation: which fit, how long a step takes, and why each other is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from minitron_megatron.config.checks.fp8 import fp8_problems
from minitron_megatron.config.checks.layout import layout_problems, shape_problems
from minitron_megatron.config.checks.training import batch_problems
from minitron_megatron.config.distill import TrainingRun
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import LayoutError, PlatformError
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.gpus import GIB
from minitron_megatron.plan.memory import Memory, training_memory, worst
from minitron_megatron.plan.stages import training_plan
from minitron_megatron.plan.time import Machine, StepTime, training_time

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "full")
VIRTUAL = (1, 2, 4)
STAGE = "distill"


class Choice(NamedTuple):
    """What is tried; the teacher's layout is settled as in a run (parallel.teacher=auto), parallel.context is the recipe's."""

    tensor: int
    pipeline: int
    virtual: int
    data: int
    micro_batch: int
    recompute: str

    def overrides(self) -> list[str]:
        """As they go onto the command line."""
        sizes = ("tensor", "pipeline", "virtual", "data")
        values = {f"parallel.{name}": getattr(self, name) for name in sizes}
        values |= {"parallel.sequence": str(self.tensor > 1).lower(), f"{STAGE}.micro_batch": self.micro_batch, "training.recompute": self.recompute}
        return [f"{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Fitting:
    choice: Choice
    memory: Memory
    step: StepTime
    teacher: TeacherParallel | None


@dataclass(frozen=True)
class Found:
    """Fastest first; refused: reason → what it refuses."""

    processes: int
    fitting: list[Fitting]
    refused: dict[str, list[Choice]]


def all_layouts(case: Case) -> Found:
    """Of the cluster's processes, or of as many as the recipe's own layout has. Raises PlatformError where there is no GPU to count for."""
    if case.machine is None or case.memory_limit is None:
        raise PlatformError(
            "--layouts needs a GPU and bf16: name a GPU in the cluster file (gpu: H100-80GB) or with --gpu, and leave precision=fp32 out"
        )
    processes = case.cluster.processes or case.recipe.parallel.processes
    fitting: list[Fitting] = []
    refused: dict[str, list[Choice]] = {}
    for choice in choices(processes // case.recipe.parallel.context, case.cluster.per_node):
        found = _tried(case, choice, case.machine, case.memory_limit)
        if isinstance(found, str):
            refused.setdefault(found, []).append(choice)
        else:
            fitting.append(found)
    return Found(processes, sorted(fitting, key=lambda one: one.step.total), refused)


def choices(processes: int, per_node: int) -> Iterator[Choice]:
    """TP stays within a node: its collectives are on every layer's way."""
    for tensor in _divisors(min(processes, per_node)):
        if processes % tensor:
            continue
        for pipeline in _divisors(processes // tensor):
            data = processes // tensor // pipeline
            for virtual in VIRTUAL if pipeline > 1 else (1,):
                for micro_batch, recompute in product(MICRO_BATCHES, RECOMPUTE):
                    yield Choice(tensor, pipeline, virtual, data, micro_batch, recompute)


def with_choice(case: Case, choice: Choice) -> Case:
    """The same case under this layout, micro-batch and recomputation."""
    return replace(case, recipe=_recipe(case.recipe, choice))


def problems(case: Case, choice: Choice) -> list[str]:
    """What the recipe's own checks say of it."""
    recipe = _recipe(case.recipe, choice)
    found = layout_problems(recipe.parallel, case.source, "the source model") + layout_problems(recipe.parallel, case.target, "the pruned model")
    found += [
        f"parallel.pipeline={choice.pipeline} is more than a teacher's {arch.layers} layers"
        for arch in case.teachers
        if choice.pipeline > arch.layers
    ]
    if choice.tensor > 1 and recipe.distill.sequence_length % choice.tensor:
        found.append(
            f"{STAGE}.sequence_length={recipe.distill.sequence_length} is not divisible by parallel.tensor={choice.tensor} (sequence parallel)"
        )
    only_distill = recipe.model_copy(update={"correct": None, "finetune": None})
    return [*found, *batch_problems(only_distill), *shape_problems(only_distill), *fp8_problems(only_distill, case.source, case.target)]


def _recipe(recipe: Recipe, choice: Choice) -> Recipe:
    sizes = {"tensor": choice.tensor, "pipeline": choice.pipeline, "virtual": choice.virtual, "data": choice.data}
    rule = {"sequence": choice.tensor > 1, "layers_per_stage": "cost", "teacher": "auto"}
    parallel: Parallel = recipe.parallel.model_copy(update={**sizes, **rule})
    training = recipe.training.model_copy(update={"recompute": choice.recompute})
    section: TrainingRun = recipe.distill.model_copy(update={"micro_batch": choice.micro_batch})
    return recipe.model_copy(update={"parallel": parallel, "training": training, STAGE: section})


def _tried(case: Case, choice: Choice, machine: Machine, limit: int) -> Fitting | str:
    """What it takes, or why it is refused; the time of what does not fit is not asked for."""
    wrong = problems(case, choice)
    if wrong:
        return wrong[0]
    own = with_choice(case, choice)
    try:
        plan = training_plan(own, STAGE)
    except LayoutError as error:
        return str(error)
    memory = worst([training_memory(plan, rank) for rank in range(plan.split.pipeline)])
    if memory.total > limit:
        return f"needs {_rounded(memory.total / GIB)} GiB a rank, of {limit / GIB:.0f} that a {machine.gpu.name} has to give"
    teacher = own.teacher_layout(own.teachers[0]) if own.teachers else None
    return Fitting(choice, memory, training_time(plan, machine), teacher)


def _rounded(gib: float) -> str:
    """In steps, so that what is alike stands together."""
    step = 10 if gib < 100 else 50
    low = int(gib // step * step)
    return f"{low} to {low + step}"


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def described(choice: Choice) -> str:
    virtual = f" × virtual {choice.virtual}" if choice.virtual > 1 else ""
    return f"TP{choice.tensor} PP{choice.pipeline}{virtual} DP{choice.data} micro-batch {choice.micro_batch} {choice.recompute}"


def grouped(items: Sequence[Choice]) -> str:
    """Choices in few words: those of one layout in one, with what they differ in behind it."""
    layouts: dict[str, list[str]] = {}
    for one in items:
        virtual = f"×V{one.virtual}" if one.virtual > 1 else ""
        layouts.setdefault(f"TP{one.tensor}·PP{one.pipeline}{virtual}·DP{one.data}", []).append(f"{one.micro_batch}/{one.recompute[0]}")
    everything = len(MICRO_BATCHES) * len(RECOMPUTE)
    return ", ".join(name if len(found) == everything else f"{name} ({' '.join(found)})" for name, found in layouts.items())
