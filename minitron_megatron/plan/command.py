"""`minitron plan`: a recipe's steps, one after another, on the console."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.family import Step, checked_steps, picked_steps
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.cluster import Cluster
from minitron_megatron.plan.gpus import Shares
from minitron_megatron.plan.layouts import all_layouts
from minitron_megatron.plan.stages import stage_plans
from minitron_megatron.plan.tables import print_layouts, print_plan
from minitron_megatron.schedule.plan import schedule_rows, schedule_table, write_picture
from minitron_megatron.search.survey import surviving


def plan_steps(
    recipe: str, overrides: list[str], cluster: Cluster, shares: Shares, console: Console, *, schedule: Path | None, layouts: bool
) -> None:
    """Every step whose shapes are known: all layouts of the distillation, or what each stage takes under the recipe's own."""
    steps = picked_steps(recipe, overrides if layouts else on_all_nodes(recipe, overrides, cluster))
    checked = checked_steps(steps)
    for step, source, target in checked:
        if step.recipe.search:
            target = surviving(step.recipe, step.recipe.search, source).largest
        case = Case(step.recipe, source, target, cluster, shares)
        if layouts:
            print_layouts(case, all_layouts(case), console)
            continue
        print_plan(case, stage_plans(case), console)
        console.print(schedule_table(schedule_rows(step.recipe, source, target), step.recipe.parallel))
        if schedule:
            _draw(step, source, target, schedule, console)
    for step in steps[len(checked) :]:
        console.print(f"step {step.name}: goes on from what a search finds; once that is there, step={step.name} is planned")


def on_all_nodes(recipe: str, overrides: list[str], cluster: Cluster) -> list[str]:
    """With data parallelism over all of the cluster's nodes, as the scripts of slurm/ start it; raises LayoutError where they are no multiple."""
    if cluster.processes is None or any(item.startswith("parallel.data=") for item in overrides):
        return overrides
    parallel = picked_steps(recipe, overrides)[0].recipe.parallel
    return [*overrides, f"parallel.data={parallel.replicas(cluster.processes)}"]


def _draw(step: Step, source: Architecture, target: Architecture, file: Path, console: Console) -> None:
    file = file.with_stem(f"{file.stem}_{step.name}") if step.name else file
    ranks, drawn = write_picture(step.recipe, source, target, file)
    console.print(f"{file}: {ranks} ranks, {drawn} micro-batches", soft_wrap=True, highlight=False)
