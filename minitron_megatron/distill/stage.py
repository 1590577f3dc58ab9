"""Stage `distill`: teacher and student loaded side by side, trained, and the student's weights published."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact, require_disk_space
from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state
from minitron_megatron.checkpoint.torch_dist import MegatronSource, weights_digest
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.batches import TokenDataset
from minitron_megatron.data.samples import evaluation_windows
from minitron_megatron.data.shared import shared_samples
from minitron_megatron.distill.hidden.projection import without_projections
from minitron_megatron.distill.hidden.training import HiddenTraining, add_hidden_losses
from minitron_megatron.distill.loop import Distillation
from minitron_megatron.distill.output_layer import DistillationOutputLayer
from minitron_megatron.distill.student import Student, make_student
from minitron_megatron.distill.teacher import Teacher, load_teacher
from minitron_megatron.distill.training_checkpoint import Progress, newest_progress
from minitron_megatron.errors import ArchitectureError, RecipeError, TrainingError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.parallel.layout import Layout, global_layout, teacher_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.parallel.world import World

SCRATCH = ("training", "cache")
"""Removed once the artifact is published: until then an interrupted start continues from them."""


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any] | None:
    """Writes checkpoint/ (weights), metrics.jsonl, validation.jsonl (each window) and tensorboard/; training/ holds the run's state until it
    is finished. None where distill.pause_after_steps ended this start before the last step."""
    settings, layout, dtype = recipe.distill, global_layout(recipe.parallel, world), torch_dtype(recipe.precision)
    teacher_arch, student_arch = (Architecture.from_dict(inputs[name].result["architecture"]) for name in ("import", "prune"))
    refuse_other_vocabulary(teacher_arch, student_arch)
    _require_wandb(settings)
    if world.is_main:
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        needed = training_bytes(student_arch, dtype, settings.keep_checkpoints + 1)
        require_disk_space(folder, needed - written, "the training checkpoints")
    teacher = _teacher(recipe, inputs["import"], student_arch, layout, world)
    student = _student(recipe, inputs["prune"], student_arch, teacher, world)
    before = newest_progress(folder / "training")
    if before.step > settings.steps:
        raise TrainingError(f"{folder}: {before.step} steps are finished; set distill.steps to {before.step} or more, or remove the folder")
    training, heldout = _texts(settings, inputs["data"], before, folder, world)
    distillation = Distillation(settings, layout, world, teacher, student, training, heldout)
    last = distillation.run(folder, recipe)
    if distillation.last_step < settings.steps:
        if world.is_main:
            print(f"distill: paused after step {distillation.progress.step} of {settings.steps}; the next start goes on from there", flush=True)
        return None
    _publish_weights(student.model, folder, world)
    digest = weights_digest(MegatronSource(folder / "checkpoint", student_arch)) if world.is_main else ""
    tokens = distillation.progress.samples * settings.sequence_length
    return {
        "summary": f"{settings.steps} steps, {tokens:,} tokens, {layout.describe()} (teacher {teacher.model.layout.describe()}), {recipe.precision}; "
        f"held-out kl {last['forward_kl']:.3f}, perplexity {last['perplexity']:.2f}",
        "architecture": student_arch.to_dict(),
        "parameters": parameter_count(student_arch),
        "steps": settings.steps,
        "tokens": tokens,
        "starts": list(distillation.progress.starts),
        "validation": last,
        "weights_sha256": digest,
    }


def _require_wandb(settings: Distill) -> None:
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        raise RecipeError("distill.wandb: the package wandb is not installed; install it with: pip install 'minitron_megatron[wandb]'")


def _teacher(recipe: Recipe, original: Artifact, student: Architecture, layout: Layout, world: World) -> Teacher:
    """In its own layout beside the student's."""
    arch, dtype = Architecture.from_dict(original.result["architecture"]), torch_dtype(recipe.precision)
    own = teacher_layout(settle_teacher(recipe.parallel, arch, student, dtype, world), world, layout)
    checkpoint, budget = original.path / "checkpoint", recipe.distill.handover_device_gib * 2**30
    return load_teacher(MegatronSource(checkpoint, arch), checkpoint, own, layout, world.platform, dtype, budget_bytes=budget)


def _student(recipe: Recipe, pruned: Artifact, arch: Architecture, teacher: Teacher, world: World) -> Student:
    """The pruned model, made ready for training."""
    model = build_model(
        arch,
        teacher.student,
        world.platform,
        torch_dtype(recipe.precision),
        output_layer=DistillationOutputLayer,
        ends=distillation_work(arch, teacher.model.architecture),
        trainable=True,
        recompute=recipe.training.recompute,
    )
    load_model(model, pruned.path / "checkpoint")
    return make_student(model, recipe.distill, recipe.training, _hidden(recipe.distill, teacher, model, pruned))


def _texts(settings: Distill, data: Artifact, before: Progress, folder: Path, world: World) -> tuple[TokenDataset, TokenDataset]:
    """Samples to train on, those that are consumed already included, and held-out windows."""
    length = settings.sequence_length
    samples = before.samples + (settings.steps - before.step) * settings.global_batch
    training = shared_samples(world, data.path / "train", samples=samples, sequence_length=length, seed=settings.seed, cache=folder / "cache")
    return training, evaluation_windows(data.path / "heldout", sequence_length=length, tokens=settings.validation_samples * length)


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


def _hidden(settings: Distill, teacher: Teacher, student: StageModel, pruned: Artifact) -> HiddenTraining | None:
    """What the recipe's hidden-state losses need on both sides, by the plan that cut the student."""
    if settings.hidden is None:
        return None
    plan, arch = json.loads((pruned.path / "plan.json").read_text()), teacher.model.architecture
    hidden = add_hidden_losses(
        student,
        settings.hidden,
        teacher_layers=arch.layers,
        teacher_hidden=arch.hidden,
        kept_layers=plan["kept_layers"],
        channels=plan["channels"],
    )
    teacher.listen(hidden.wanted)
    return hidden


def settle_teacher(parallel: Parallel, teacher: Architecture, student: Architecture, dtype: torch.dtype, world: World) -> TeacherParallel:
    """The teacher's layout; `auto` is one without a pipeline, and so without its bubbles, where both models take at most half of the
    memory that is free on every process. It changes no bit of the teacher's states. A teacher with experts has the student's sizes, because
    only megatron's global groups have some for experts."""
    if isinstance(parallel.teacher, TeacherParallel):
        return parallel.teacher
    as_student = TeacherParallel(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=parallel.sequence)
    if parallel.teacher == "student" or parallel.pipeline == 1 or teacher.experts:
        return as_student
    free = torch.tensor(world.platform.free_memory_bytes(), device=world.platform.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    needed = dtype.itemsize * parameter_count(teacher) / parallel.tensor + training_bytes(student, dtype, 1) / (parallel.tensor * parallel.pipeline)
    return as_student.model_copy(update={"pipeline": 1}) if needed <= int(free) / 2 else as_student


def _publish_weights(student: StageModel, folder: Path, world: World) -> None:
    """The student's weights alone, without the optimizer's state."""
    if world.is_main:
        (folder / "checkpoint").mkdir(exist_ok=True)
    world.barrier()
    save_state({name: without_projections(chunk) for name, chunk in model_state(student).items()}, folder / "checkpoint")
    world.barrier()
