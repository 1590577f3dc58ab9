"""Recipes with a search, without files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.schema import Recipe

# sizes of Nemotron-4 15B, in a family that has no rule on hidden sizes
LARGE = Architecture("mistral", 32, 6144, 48, 8, 128, 24576, 256000, False, 4096, 1e-5, 10000.0)
SMALL = Architecture("llama", 4, 32, 8, 2, 6, 48, 131, True, 128, 1e-5, 10000.0)


@pytest.fixture
def recipe_of() -> Callable[..., Recipe]:
    """recipe_of(space={…}, **search): a recipe around a search."""

    def make(space: dict[str, Any], parallel: dict[str, Any] | None = None, **search: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "tiny",
                "platform": "cpu",
                "precision": "fp32",
                "model": {"path": "somewhere"},
                "data": {"train": ["x"]},
                "parallel": parallel or {},
                "importance": {"sequence_length": 32},
                "distill": {"steps": 500, "sequence_length": 32, "global_batch": 4},
                "evaluate": {"sequence_length": 32},
                "search": {"space": space, **search},
            }
        )

    return make
