"""Stage `finetune`: supervised fine-tuning of the distilled student, cross-entropy of what the assistant says in conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.answers import answer_samples, heldout_answers
from minitron_megatron.errors import RecipeError
from minitron_megatron.parallel.world import World
from minitron_megatron.training import job
from minitron_megatron.training.training_checkpoint import Progress

SCRATCH = job.SCRATCH


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes checkpoint/, metrics.jsonl and tensorboard/; losses are means over the tokens that count."""
    settings, student = recipe.finetune, inputs["distill"]
    if settings is None:
        raise RecipeError("finetune: no such section; add it")
    finetuning, arch = job.Job("finetune", settings, recipe, folder, world), Architecture.from_dict(student.result["architecture"])
    before = finetuning.begin(arch)
    return finetuning.train_alone(arch, student.path / "checkpoint", _texts(finetuning, inputs["chat"], before))


def _texts(finetuning: job.Job, chat: Artifact, before: Progress) -> job.Texts:
    """Packed anew from the conversations' lengths where the length of a sample is another than the chat stage's."""
    settings, packing = finetuning.settings, chat.result["packing"]
    samples, length = finetuning.samples(before), settings.sequence_length
    training = answer_samples(chat.path / "train", samples=samples, sequence_length=length, seed=settings.seed, packing=packing)
    return training, heldout_answers(chat.path / "heldout", sequence_length=length, at_most=settings.validation_samples)
