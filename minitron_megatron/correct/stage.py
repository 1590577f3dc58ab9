"""Stage `correct`: teacher correction (arXiv 2408.11796, sections 2.1 and 4), cross-entropy on the text that the distillation will see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact
from minitron_megatron.checkpoint.sharded import save_state
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError
from minitron_megatron.parallel.world import World
from minitron_megatron.training import job
from minitron_megatron.training.published import published_state
from minitron_megatron.training.snapshots import Snapshots
from minitron_megatron.training.student import Student
from minitron_megatron.training.training_checkpoint import Progress

SCRATCH = job.SCRATCH


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes checkpoint/, metrics.jsonl and tensorboard/; beside a distillation a teacher below runs/NAME/corrected/ at each save as well."""
    settings, source, data = recipe.correct, inputs["import"], inputs["data"]
    if settings is None:
        raise RecipeError("correct: no such section; add it")
    correction, arch = job.Job("correct", settings, recipe, folder, world), Architecture.from_dict(source.result["architecture"])
    kept = settings.keep_snapshots + 1 if settings.beside else 0
    before = correction.begin(arch, further_bytes=kept * correction.dtype.itemsize * parameter_count(arch))
    snapshots = Snapshots.of(recipe, source, data)

    def publish(student: Student, progress: Progress) -> None:
        snapshots.publish(progress.step, lambda path: save_state(published_state(student), path), world, keep=settings.keep_snapshots)

    texts = correction.texts(inputs, before, mask_boundaries=settings.mask_boundaries)
    return correction.train_alone(arch, source.path / "checkpoint", texts, publish if settings.beside else None)
