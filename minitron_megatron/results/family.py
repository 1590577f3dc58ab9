"""The results of a family's steps beside each other: the original, then every step's pruned and distilled model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.artifact import write_json
from minitron_megatron.results.table import markdown_table

TEACHER = "teacher"


def family_result(steps: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One result out of those of the evaluate stages, step name → result; every KL and agreement is to that step's own teacher."""
    first = next(iter(steps.values()))
    models = {"original": first["models"][TEACHER]}
    for step, result in steps.items():
        models |= {f"{step} {name}": figures for name, figures in result["models"].items() if name != TEACHER}
    return {**first, "models": models, "remark": "KL and agreement of each step's models are to its own teacher"}


def publish_family(steps: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Writes family.md and family.json beside the steps' folders; returns the one result."""
    result = family_result(steps)
    (folder / "family.md").write_text(markdown_table(result))
    write_json(folder / "family.json", result)
    return result
