"""What each stage of a recipe takes under one layout: memory of a rank, work, time, traffic, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.chain import stages_of
from minitron_megatron.config.distill import TrainingRun
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.checkpoints import checkpoint_bytes, training_checkpoint_bytes
from minitron_megatron.plan.forward import ForwardPlan, forward_plans
from minitron_megatron.plan.memory import Memory, TrainingPlan, training_memory, worst
from minitron_megatron.plan.time import StepTime, training_time
from minitron_megatron.plan.traffic import Traffic, training_traffic
from minitron_megatron.plan.weights import elements
from minitron_megatron.plan.work import model_flops

TRAINED = ("correct", "distill", "finetune")


@dataclass(frozen=True)
class StagePlan:
    """What is not known, or is none, is None."""

    name: str
    tokens: int | None = None
    flops: float | None = None
    """Of the task, on all ranks: 2 for each multiply-add, 3 passes in training, nothing computed twice."""
    memory: Memory | None = None
    """Of the fullest rank."""
    seconds: float | None = None
    processes: int = 1
    steps: int = 0
    step: StepTime | None = None
    traffic: Traffic | None = None
    """Of a step."""
    written: int | None = None
    """Bytes below runs/, checkpoints of a run under way included where they are the most."""
    note: str = ""

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.processes / 3600


def stage_plans(case: Case) -> list[StagePlan]:
    """Of every stage that the recipe's chain has, in order; a correction beside the distillation too."""
    names = [stage.name for stage in stages_of(case.recipe)]
    if case.recipe.correct_beside:
        names.insert(names.index("distill"), "correct")
    forward = forward_plans(case)
    return [_stage(case, name, forward) for name in names]


def _stage(case: Case, name: str, forward: dict[str, Callable[[], ForwardPlan]]) -> StagePlan:
    if name in TRAINED:
        return trained_stage(case, name)
    if name in forward:
        found = forward[name]()
        return StagePlan(name, found.tokens, found.flops, found.memory, found.seconds, found.processes, written=found.written, note=found.note)
    written, note = _streams(case).get(name, (None, "one process, on the CPU"))
    return StagePlan(name, written=written, note=note)


def training_plan(case: Case, name: str) -> TrainingPlan:
    arch, settings = trained_model(case, name)
    return case.training(arch, settings)


def trained_model(case: Case, name: str) -> tuple[Architecture, TrainingRun]:
    return (case.source if name == "correct" else case.target), case.recipe.training_runs()[name]


def trained_stage(case: Case, name: str) -> StagePlan:
    """One of TRAINED; memory of its fullest rank, time where the cluster has a GPU."""
    plan = training_plan(case, name)
    settings, ranks = plan.settings, range(plan.split.pipeline)
    per_step = settings.global_batch * settings.sequence_length
    flops = model_flops(plan.run, per_step, passes=3) + sum(model_flops(one.run, per_step, passes=1) for one in plan.teachers)
    step = training_time(plan, case.machine) if case.machine else None
    largest = max(elements([weight for chunk in plan.weights(rank) for weight in chunk]) for rank in ranks)
    kept = settings.keep_checkpoints + 1  # one is written before the oldest goes
    return StagePlan(
        name,
        tokens=settings.steps * per_step,
        flops=settings.steps * flops,
        memory=worst([training_memory(plan, rank) for rank in ranks]),
        seconds=settings.steps * step.total if step else None,
        processes=case.recipe.parallel.processes,
        steps=settings.steps,
        step=step,
        traffic=training_traffic(plan, largest),
        written=kept * training_checkpoint_bytes(plan.split.arch, case.width) + checkpoint_bytes(plan.split.arch, case.width),
        note=f"{kept} training checkpoints of {training_checkpoint_bytes(plan.split.arch, case.width) / 1e9:.1f} GB while it runs",
    )


def _streams(case: Case) -> dict[str, tuple[int, str]]:
    """Stages that move tensors: they hold a few of them at a time, whatever the model's size."""
    source, target = (checkpoint_bytes(arch, 2) for arch in (case.source, case.target))
    return {
        "import": (source, _moved(source, source)),
        "prune": (target, _moved(source, target)),
        "export": (target, _moved(target, target)),
    }


def _moved(read: int, written: int) -> str:
    return f"on the CPU: a stream that reads {read / 1e9:.1f} and writes {written / 1e9:.1f} GB, some tensors in memory at a time"
