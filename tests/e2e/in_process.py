"""Stands for the launcher: starting a process takes longer than what a tiny model's stage does."""

from __future__ import annotations

from contextlib import ExitStack

from minitron_megatron.chain import STAGES
from minitron_megatron.parallel.layout import destroy_layout
from minitron_megatron.worker import prepare, run_here

STARTED: list[str] = []
"""`NAME STAGE` of every stage that was started."""


def in_this_process(stage: str, recipe_path: str, overrides: list[str], processes: int) -> int:
    recipe, platform = prepare(recipe_path, overrides)
    with ExitStack() as connections:
        run_here(STAGES[stage], recipe, recipe_path, platform, connections)
        destroy_layout()
    STARTED.append(f"{recipe.name} {stage}")
    return 0
