"""What is counted ahead of a measurement: the memory of a step, how many layers fit, and the multiply-adds that the task asks for."""

from __future__ import annotations

from shapes import FP8, Precision

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.fp8 import Fp8
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune, Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.source import Data, Model
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.cluster import Cluster
from minitron_megatron.plan.gpus import ACCELERATORS, Accelerator
from minitron_megatron.plan.memory import Memory, TrainingPlan, training_memory
from minitron_megatron.plan.stages import training_plan
from minitron_megatron.plan.work import model_flops

H200 = ACCELERATORS["H200-141GB"]
TOKENS_OF_A_STEP = 16384
"""In several micro-batches, so that gradients are added up and the optimizer's step is shared out as in a real run."""


def settings_of(sequence: int, *, tokens: int = TOKENS_OF_A_STEP, micro_batch: int = 1, loss_memory_mib: int = 512) -> Distill:
    samples = max(micro_batch, tokens // sequence // micro_batch * micro_batch)
    return Distill(steps=1000, sequence_length=sequence, global_batch=samples, micro_batch=micro_batch, loss_memory_mib=loss_memory_mib)


def plan_of(teacher: Architecture, student: Architecture, settings: Distill, precision: Precision, gpu: Accelerator = H200) -> TrainingPlan:
    """On one GPU, bf16 but for what the precision keeps in FP8."""
    recipe = Recipe(
        name="step",
        platform="cuda",
        precision="bf16",
        model=Model(path="nowhere"),
        data=Data(train=["nothing"]),
        parallel=Parallel(),
        prune=Prune(target=Target(layers=student.layers, hidden=student.hidden, ffn=student.ffn)),
        distill=settings,
        fp8=FP8.get(precision.name, Fp8()) if precision.student else None,
    )
    return training_plan(Case(recipe, teacher, student, Cluster(gpu, 1)), "distill")


def memory_of(plan: TrainingPlan) -> Memory:
    return training_memory(plan, 0)


def most_layers(teacher: Architecture, student: Architecture, settings: Distill, precision: Precision, free_bytes: int) -> int:
    """How many layers of both models fit beside each other, with the student's gradients and optimizer; at least 1."""
    fitting = [
        layers
        for layers in range(1, teacher.layers + 1)
        if memory_of(plan_of(teacher.resized(layers=layers), student.resized(layers=layers), settings, precision)).total <= free_bytes
    ]
    return max(fitting, default=1)


def step_flops(plan: TrainingPlan) -> float:
    """Of a step, multiply-adds counted as two, causal attention over half of the sequence, nothing that is computed again:
    one pass of the teacher with its output layer, three of the student (forward, and gradients of states and of weights)."""
    tokens = plan.settings.global_batch * plan.settings.sequence_length
    return model_flops(plan.run, tokens, passes=3) + sum(model_flops(one.run, tokens, passes=1) for one in plan.teachers)
