"""What a form of export can hold."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.schema import Recipe


def export_problems(recipe: Recipe, source: Architecture) -> list[str]:
    if recipe.export.format == "nemo" and source.experts:
        return [f"export.format=nemo: .nemo archives of {source.family_name}, which has experts, are not written; set export.format=huggingface"]
    return []
