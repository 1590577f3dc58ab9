"""The Llama-3.1-8B shape and what a recipe may not ask of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import RecipeError

Recipes = Callable[..., Path]

LLAMA_8B = Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 131072, 1e-5, 500000.0)
WIDTH = {"prune": {"target": {"hidden": 3072, "ffn": 9216}}, "distill": {"sequence_length": 4096}}


def problems(file: Path, overrides: list[str], source: Architecture = LLAMA_8B) -> list[str]:
    try:
        check_recipe(load_recipe(file, overrides), source)
    except RecipeError as error:
        return error.problems
    return []
