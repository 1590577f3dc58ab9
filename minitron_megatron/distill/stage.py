"""Stage `distill`: teachers and student loaded side by side, trained, and the student's weights published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.schema import Recipe
from minitron_megatron.distill.hidden.projection import without_projections
from minitron_megatron.distill.hidden.training import HiddenTraining, add_hidden_losses
from minitron_megatron.distill.stored import StoredTeachers, stored_teachers
from minitron_megatron.distill.teachers import Teachers, load_teachers
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.parallel.world import World
from minitron_megatron.training import job
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.losses.settings import OF_STORED
from minitron_megatron.training.published import published_state
from minitron_megatron.training.student import make_student

SCRATCH = job.SCRATCH


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any] | None:
    """Writes checkpoint/ (weights), metrics.jsonl, validation.jsonl (each held-out window) and tensorboard/; training/ holds the run's state
    until it is finished. None where distill.pause_after_steps ended this start before the last step."""
    settings, arch = recipe.distill, Architecture.from_dict(inputs["prune"].result["architecture"])
    distillation = job.Job("distill", settings, recipe, folder, world)
    before = distillation.begin(arch)
    texts = distillation.texts(inputs, before, mask_boundaries=settings.mask_boundaries)
    teachers: Teachers | StoredTeachers
    if settings.teacher_outputs == "stored":
        teachers = stored_teachers(recipe, inputs["teacher-logits"], distillation.layout)
        teachers.require(vocab=arch.vocab, training=texts[0], heldout=texts[1])
        architectures = []
    else:
        teachers = load_teachers(distillation, inputs, arch, before)
        architectures = [teacher.architecture for teacher in teachers.members]
    model = distillation.student(arch, inputs["prune"].path / "checkpoint", *architectures)
    hidden = None if isinstance(teachers, StoredTeachers) else _hidden(settings, teachers, model, inputs["prune"])
    student = make_student(model, settings, recipe.training, hidden)
    if isinstance(teachers, StoredTeachers):
        student.loss_settings = replace(student.loss_settings, stored=teachers.form.kind)
    loop = TrainingLoop("distill", settings, distillation.layout, world, teachers, student, *texts, pause_after_steps=settings.pause_after_steps)
    last = loop.run(folder, recipe)
    if loop.last_step < settings.steps:
        if world.is_main:
            print(f"distill: paused after step {loop.progress.step} of {settings.steps}; the next start goes on from there", flush=True)
        return None
    distillation.publish_weights({name: without_projections(chunk) for name, chunk in published_state(student).items()})
    kl = next(last[name] for name in ("forward_kl", *OF_STORED.values()) if name in last)
    told = f"kl {kl:.3f}, perplexity {last['perplexity']:.2f}"
    return distillation.result(arch, loop, last, told, f" (teacher {teachers.describe()})")


def _hidden(settings: Distill, teachers: Teachers, student: StageModel, pruned: Artifact) -> HiddenTraining | None:
    """What the recipe's hidden-state losses need on both sides, by the plan that cut the student where its source is the first teacher."""
    if settings.hidden is None:
        return None
    plan, teacher = json.loads((pruned.path / "plan.json").read_text()), teachers.members[0]
    hidden = add_hidden_losses(
        student,
        settings.hidden,
        teacher_layers=teacher.architecture.layers,
        teacher_hidden=teacher.architecture.hidden,
        kept_layers=plan["kept_layers"],
        channels=plan["channels"] if teachers.first_is_source else None,
    )
    teacher.listen(hidden.wanted)
    return hidden
