"""Stage `distill`: teacher and student loaded side by side, trained, and the student's weights published."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact, require_disk_space
from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state
from minitron_megatron.checkpoint.torch_dist import MegatronSource, weights_digest
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.samples import evaluation_windows
from minitron_megatron.data.shared import shared_samples
from minitron_megatron.distill.loop import Distillation
from minitron_megatron.distill.output_layer import DistillationOutputLayer
from minitron_megatron.distill.student import make_student
from minitron_megatron.errors import ArchitectureError, RecipeError
from minitron_megatron.model.gpt import HiddenStateGPT, build_model
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.world import World

SCRATCH = ("training", "cache")
"""Removed once the artifact is published: until then an interrupted start continues from them."""


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes checkpoint/ (weights), metrics.jsonl and tensorboard/; training/ holds the run's state until it is finished."""
    settings, layout = recipe.distill, global_layout(recipe.parallel, world)
    teacher_arch, student_arch = (Architecture.from_dict(inputs[name].result["architecture"]) for name in ("import", "prune"))
    refuse_other_vocabulary(teacher_arch, student_arch)
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        raise RecipeError("distill.wandb: the package wandb is not installed; install it with: pip install 'minitron_megatron[wandb]'")
    dtype = torch_dtype(recipe.precision)
    if world.is_main:
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        needed = training_bytes(student_arch, dtype, settings.keep_checkpoints + 1)
        require_disk_space(folder, needed - written, "the training checkpoints")
    teacher = _load(teacher_arch, inputs["import"], layout, world, dtype)
    student = _load(student_arch, inputs["prune"], layout, world, dtype, output_layer=DistillationOutputLayer, trainable=True)
    data = inputs["data"].path
    distillation = Distillation(
        settings=settings,
        layout=layout,
        world=world,
        teacher=teacher,
        student=make_student(student, settings),
        training=shared_samples(
            world,
            data / "train",
            samples=settings.steps * settings.global_batch,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            cache=folder / "cache",
        ),
        heldout=evaluation_windows(
            data / "heldout",
            sequence_length=settings.sequence_length,
            tokens=settings.validation_samples * settings.sequence_length,
        ),
    )
    last = distillation.run(folder, recipe)
    _publish_weights(student, folder, world)
    digest = weights_digest(MegatronSource(folder / "checkpoint", student_arch)) if world.is_main else ""
    tokens = settings.steps * settings.global_batch * settings.sequence_length
    return {
        "summary": f"{settings.steps} steps, {tokens:,} tokens, {layout.describe()}, {recipe.precision}; "
        f"held-out kl {last['forward_kl']:.3f}, perplexity {last['perplexity']:.2f}",
        "architecture": student_arch.to_dict(),
        "parameters": parameter_count(student_arch),
        "steps": settings.steps,
        "tokens": tokens,
        "validation": last,
        "weights_sha256": digest,
    }


def refuse_other_vocabulary(teacher: Architecture, student: Architecture) -> None:
    """The KL compares distributions over one vocabulary."""
    if teacher.vocab != student.vocab:
        raise ArchitectureError(
            f"the student's vocabulary of {student.vocab} is not the teacher's of {teacher.vocab}; distil from a teacher with the same tokenizer"
        )


def training_bytes(arch: Architecture, dtype: torch.dtype, checkpoints: int) -> int:
    """Weights, Adam's two moments and, below fp32, the fp32 main copy."""
    per_parameter = dtype.itemsize + 8 + (4 if dtype != torch.float32 else 0)
    return checkpoints * per_parameter * parameter_count(arch)


def _load(arch: Architecture, artifact: Artifact, layout: Layout, world: World, dtype: torch.dtype, **options: Any) -> HiddenStateGPT:
    model = build_model(arch, layout, world.platform, dtype, **options)
    load_model(model, artifact.path / "checkpoint")
    return model


def _publish_weights(student: HiddenStateGPT, folder: Path, world: World) -> None:
    """The student's weights alone, without the optimizer's state."""
    if world.is_main:
        (folder / "checkpoint").mkdir(exist_ok=True)
    world.barrier()
    save_state(model_state(student), folder / "checkpoint")
    world.barrier()
