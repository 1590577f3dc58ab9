"""Stage `finetune`: supervised fine-tuning of the distilled student, cross-entropy of what the assistant says in conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError
from minitron_megatron.parallel.world import World
from minitron_megatron.training import job

SCRATCH = job.SCRATCH


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes checkpoint/, metrics.jsonl and tensorboard/; losses are means over the tokens that count."""
    settings, student = recipe.finetune, inputs["distill"]
    if settings is None:
        raise RecipeError("finetune: no such section; add it")
    finetuning, arch = job.Job("finetune", settings, recipe, folder, world), Architecture.from_dict(student.result["architecture"])
    before = finetuning.begin(arch)
    return finetuning.train_alone(arch, student.path / "checkpoint", finetuning.texts(inputs, before))
