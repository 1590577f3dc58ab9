"""`minitron plan`: a distillation's schedules beside each other for a recipe and for pipelines of 2 to 16 ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.teachers import teacher_architectures
from minitron_megatron.config.parallel import Rule
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.results.svg import standalone
from minitron_megatron.schedule.picture import NAMES, Row, gantt_svg, row
from minitron_megatron.schedule.works import distillation_works

RANKS = (2, 4, 8, 16)


def micro_batches(recipe: Recipe) -> int:
    """Of a step, on each data-parallel rank."""
    return recipe.distill.global_batch // (recipe.distill.micro_batch * recipe.parallel.data)


def schedule_rows(recipe: Recipe, source: Architecture, target: Architecture) -> list[Row]:
    """The recipe's own pipeline and those of RANKS that the models have layers for; the micro-batches are the recipe's."""
    teachers = teacher_architectures(recipe, source)
    fewest = min(arch.layers for arch in (target, *teachers))
    wanted = sorted({ranks for ranks in (recipe.parallel.pipeline, *RANKS) if 1 < ranks <= fewest})
    return [row(distillation_works(target, teachers, ranks, _rule(recipe, ranks)), micro_batches(recipe)) for ranks in wanted]


def _rule(recipe: Recipe, ranks: int) -> Rule:
    """The recipe's for its own pipeline; a list for virtual stages is none of whole ranks."""
    own = recipe.parallel.pipeline == ranks and recipe.parallel.virtual == 1
    return recipe.parallel.layers_per_stage if own else "cost"


def schedule_table(rows: Sequence[Row], own: int) -> Table:
    """Step over ideal by pipeline; the recipe's own is marked."""
    count = f"{rows[0].micro_batches} micro-batches" if rows else ""
    table = Table(title=f"A distillation step over its ideal, in which no rank waits ({count}; simulated, sending takes no time)")
    table.add_column("pipeline", justify="right")
    for name in NAMES.values():
        table.add_column(name, justify="right")
    for item in rows:
        figures = [f"{item.over_ideal[order]:.3f}" for order in NAMES]
        table.add_row(f"{item.ranks}{' (recipe)' if item.ranks == own else ''}", *figures)
    return table


def write_picture(recipe: Recipe, source: Architecture, target: Architecture, file: Path) -> tuple[int, int]:
    """The Gantt picture of the recipe's pipeline, of two ranks where it has none; ranks and micro-batches that are drawn.

    Raises ArtifactError where the file's folder is missing.
    """
    if not file.parent.is_dir():
        raise ArtifactError(f"{file.parent}: no such folder; make it, or name another file with --schedule")
    ranks = max(2, recipe.parallel.pipeline)
    drawn = min(micro_batches(recipe), 2 * ranks)  # more would be thinner than a line
    works = distillation_works(target, teacher_architectures(recipe, source), ranks, _rule(recipe, ranks))
    file.write_text(standalone(gantt_svg(works, drawn)), encoding="utf-8")
    return ranks, drawn
