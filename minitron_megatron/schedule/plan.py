"""`minitron plan`: a distillation's schedules beside each other for a recipe and for pipelines of 2 to 16 ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.table import Table

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.teachers import teacher_architectures
from minitron_megatron.config.parallel import Parallel, Rule
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.results.svg import standalone
from minitron_megatron.schedule.picture import NAMES, Row, gantt_svg, row
from minitron_megatron.schedule.works import distillation_works

RANKS = (2, 4, 8, 16)
VIRTUAL = 2
"""Stages of each rank in the rows of interleaved schedules."""


def micro_batches(recipe: Recipe) -> int:
    """Of a step, on each data-parallel rank."""
    return recipe.distill.global_batch // (recipe.distill.micro_batch * recipe.parallel.data)


def schedule_rows(recipe: Recipe, source: Architecture, target: Architecture) -> list[Row]:
    """The recipe's own pipeline and those of RANKS, each with and without virtual stages, that the models have layers for and, if interleaved,
    whose ranks divide the micro-batches; these are the recipe's."""
    teachers, number = teacher_architectures(recipe, source), micro_batches(recipe)
    fewest = min(arch.layers for arch in (target, *teachers))
    own = recipe.parallel.pipeline, recipe.parallel.virtual
    wanted = sorted({own, *product(RANKS, (1, VIRTUAL))})
    possible = [(ranks, virtual) for ranks, virtual in wanted if 1 < ranks <= fewest and ranks * virtual <= target.layers]
    return [
        row(distillation_works(target, teachers, ranks, _rule(recipe, ranks, virtual), virtual=virtual), number)
        for ranks, virtual in possible
        if virtual == 1 or number % ranks == 0
    ]


def _rule(recipe: Recipe, ranks: int, virtual: int) -> Rule:
    """The recipe's for its own pipeline."""
    own = (recipe.parallel.pipeline, recipe.parallel.virtual) == (ranks, virtual)
    return recipe.parallel.layers_per_stage if own else "cost"


def schedule_table(rows: Sequence[Row], own: Parallel) -> Table:
    """Step over ideal by pipeline; the recipe's own is marked."""
    count = f"{rows[0].micro_batches} micro-batches" if rows else ""
    table = Table(title=f"A distillation step over its ideal, in which no rank waits ({count}; simulated, sending takes no time)")
    table.add_column("pipeline", justify="right")
    for name in NAMES.values():
        table.add_column(name, justify="right")
    for item in rows:
        figures = [f"{item.over_ideal[order]:.3f}" if order in item.over_ideal else "–" for order in NAMES]
        named = f"{item.ranks}{f' × virtual {item.virtual}' if item.virtual > 1 else ''}"
        is_own = (item.ranks, item.virtual) == (own.pipeline, own.virtual)
        table.add_row(f"{named}{' (recipe)' if is_own else ''}", *figures)
    return table


def write_picture(recipe: Recipe, source: Architecture, target: Architecture, file: Path) -> tuple[int, int]:
    """The Gantt picture of the recipe's pipeline, of two ranks where it has none; ranks and micro-batches that are drawn.

    Raises ArtifactError where the file's folder is missing.
    """
    if not file.parent.is_dir():
        raise ArtifactError(f"{file.parent}: no such folder; make it, or name another file with --schedule")
    ranks = max(2, recipe.parallel.pipeline)
    virtual = recipe.parallel.virtual if recipe.parallel.pipeline > 1 else 1
    drawn = min(micro_batches(recipe), 2 * ranks)  # more would be thinner than a line
    works = distillation_works(target, teacher_architectures(recipe, source), ranks, _rule(recipe, ranks, virtual), virtual=virtual)
    file.write_text(standalone(gantt_svg(works, drawn)), encoding="utf-8")
    return ranks, drawn
