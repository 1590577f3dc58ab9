"""The teachers that a recipe gives a distillation, as they lie on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.training.snapshots import Snapshots


class Given(NamedTuple):
    """A teacher on disk."""

    checkpoint: Path
    architecture: Architecture
    weight: float = 1.0
    is_source: bool = True


def given_teachers(recipe: Recipe, inputs: Mapping[str, Artifact], source: Path) -> list[Given]:
    """The recipe's list; without one the source alone. source: its checkpoint, corrected or not."""
    arch = Architecture.from_dict(inputs["import"].result["architecture"])
    if recipe.teachers is None:
        return [Given(source, arch)]
    imported, found = iter(inputs["teachers"].result["models"]), []
    for model in recipe.teachers.models:
        if model.is_source:
            found.append(Given(source, arch, model.weight))
        else:
            entry = next(imported)
            folder = inputs["teachers"].path / entry["folder"] / "checkpoint"
            found.append(Given(folder, Architecture.from_dict(entry["architecture"]), model.weight, False))
    return found


def first_teacher(recipe: Recipe, inputs: Mapping[str, Artifact]) -> tuple[Architecture, Path]:
    """Of a finished distillation, or of the recipe where none is read; raises ArtifactError for a state of the teacher that is not kept any more."""
    source = inputs.get("correct", inputs["import"])
    last = inputs["distill"].result.get("teacher", "") if "distill" in inputs else ""
    checkpoint = source.path / "checkpoint"
    if last and last != source.id:
        checkpoint = Snapshots.of(recipe, source, inputs["data"]).checkpoint(last)
    first = given_teachers(recipe, inputs, checkpoint)[0]
    return first.architecture, first.checkpoint
