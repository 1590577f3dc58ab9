"""A whole recipe as YAML, with the keys of a test in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Recipes = Callable[..., Path]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Recipes:
    """recipe_file(section={…}, …): the file; a section is merged into the default one, None removes it."""

    def write(**sections: Any) -> Path:
        values: dict[str, Any] = {
            "name": "tiny",
            "model": {"path": "somewhere"},
            "data": {"train": ["text/*.txt"]},
            "importance": {"samples": 4, "sequence_length": 32},
            "prune": {"target": {"ffn": 16}},
            "distill": {"steps": 100, "sequence_length": 32, "global_batch": 4},
            "evaluate": {"sequence_length": 32},
        }
        for name, value in sections.items():
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        return file

    return write
