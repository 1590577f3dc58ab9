"""The plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from minitron_megatron.plan.case import Case
from minitron_megatron.plan.gpus import GIB, KEPT_FREE_GIB
from minitron_megatron.plan.layouts import Found, described, grouped
from minitron_megatron.plan.stages import StagePlan, needed_disk
from minitron_megatron.results.table import short_count

BEST = 12
"""Fitting layouts that are shown."""
NONE = "–"


def print_plan(case: Case, stages: Sequence[StagePlan], console: Console) -> None:
    """Every stage in a row; then memory by what it is for, time and traffic of those that train."""
    console.print(stage_table(case, stages))
    limit = case.memory_limit
    if limit is None:
        console.print("No GPU is planned for: memory as on a CPU, no time. A cluster file with `gpu:` (cluster=FILE) or --gpu NAME names one.")
    console.print(memory_table(case, stages))
    for line in warnings(case, stages):
        console.print(line)
    if any(stage.step for stage in stages):
        console.print(step_table(case, stages))
    console.print(f"On disk, if all of it is kept: {needed_disk(list(stages)) / 1e9:,.0f} GB, tokenized text and the source's own files not counted.")


def stage_table(case: Case, stages: Sequence[StagePlan]) -> Table:
    cluster, parallel = case.cluster, case.recipe.parallel
    where = f"{parallel.processes} × {cluster.gpu.name}" if case.kernels == "cuda" and cluster.gpu else f"{parallel.processes} CPU processes"
    sizes = f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × data {parallel.data}"
    table = Table(title=f"{case.recipe.name}: the stages on {where} ({sizes}, {case.precision})", title_justify="left")
    table.add_column("stage")
    for header in ("tokens", "PFLOP", "GiB a rank", "steps", "s a step", "hours", "GPU-hours", "writes GB"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    for stage in stages:
        table.add_row(*_row(stage))
    hours, gpu_hours = sum(stage.seconds or 0 for stage in stages) / 3600, sum(stage.gpu_hours or 0 for stage in stages)
    if hours:
        table.add_section()
        table.add_row("all", "", _number(sum(stage.flops or 0 for stage in stages) / 1e15), "", "", "", _number(hours), _number(gpu_hours), "", "")
    return table


def _row(stage: StagePlan) -> tuple[str, ...]:
    return (
        stage.name,
        NONE if stage.tokens is None else short_count(stage.tokens),
        NONE if stage.flops is None else _number(stage.flops / 1e15),
        NONE if stage.memory is None else f"{stage.memory.total / GIB:.2f}",
        f"{stage.steps:,}" if stage.steps else NONE,
        NONE if stage.step is None else f"{stage.step.total:.2f}",
        NONE if stage.seconds is None else _number(stage.seconds / 3600),
        NONE if stage.gpu_hours is None else _number(stage.gpu_hours),
        NONE if stage.written is None else _number(stage.written / 1e9),
        stage.note,
    )


def memory_table(case: Case, stages: Sequence[StagePlan]) -> Table:
    """GiB of the fullest rank of each stage at its fullest moment."""
    counted = [(stage, stage.memory) for stage in stages if stage.memory]
    table = Table(title="Memory of the fullest rank, GiB", title_justify="left")
    table.add_column("")
    for stage, _ in counted:
        table.add_column(stage.name, justify="right")
    names = dict.fromkeys(name for _, memory in counted for name in memory.parts)
    for name in names:
        table.add_row(name, *[f"{memory.parts[name] / GIB:.2f}" if name in memory.parts else "" for _, memory in counted])
    table.add_section()
    table.add_row("all", *[f"{memory.total / GIB:.2f}" for _, memory in counted], style="bold")
    if any(memory.host for _, memory in counted):
        table.add_row("pinned host memory besides", *[f"{memory.host / GIB:.2f}" if memory.host else "" for _, memory in counted])
    if case.recipe.parallel.pipeline > 1:
        table.add_row("which rank", *[memory.where.removeprefix("pipeline ") for _, memory in counted])
    table.add_row("fullest moment", *[memory.fullest for _, memory in counted])
    return table


def warnings(case: Case, stages: Sequence[StagePlan]) -> list[str]:
    """Stages that do not fit."""
    limit = case.memory_limit
    if limit is None or case.cluster.gpu is None:
        return []
    gpu, found = case.cluster.gpu, []
    for stage in stages:
        if stage.memory and stage.memory.total > limit:
            told = f"{stage.name} needs {stage.memory.total / GIB:.1f} GiB a rank, and a {gpu.name} has {limit / GIB:.0f}"
            found.append(f"[bold]does not fit:[/bold] {told} ({gpu.memory_gib:.0f} − {KEPT_FREE_GIB:.0f} kept free); --layouts shows what does")
    parallel = case.recipe.parallel
    if parallel.tensor > case.cluster.per_node:
        found.append(f"parallel.tensor={parallel.tensor} spans nodes of {case.cluster.per_node}: every layer waits for the network")
    if case.cluster.processes and case.cluster.processes != parallel.processes:
        found.append(f"the cluster file has {case.cluster.processes} GPUs, the recipe's layout takes {parallel.processes}")
    return found


def step_table(case: Case, stages: Sequence[StagePlan]) -> Table:
    """Time and bytes sent of one step."""
    shares = case.shares
    title = f"One step: seconds at {shares.matrix:.0%} of the peak in matrix products, {shares.memory:.0%} of memory's and {shares.links:.0%} of links'"
    table = Table(title=f"{title} bandwidth (assumed, not measured); GB that the busiest rank sends", title_justify="left")
    table.add_column("stage")
    headers = ("passes", "of it waiting", "reduction", "optimizer", "all", "tokens/s a GPU", "of the peak", "TP GB", "PP GB", "DP GB", "states GB")
    for header in headers:
        table.add_column(header, justify="right")
    for stage in stages:
        if stage.step and stage.traffic and stage.tokens and stage.flops and case.cluster.gpu:
            step, gpus = stage.step, stage.processes
            speed = stage.tokens / stage.steps / step.total / gpus
            share = stage.flops / stage.steps / step.total / gpus / case.cluster.gpu.gpu.flops["bf16"]
            times = [f"{value:.2f}" for value in (step.passes, step.waiting, step.reduction, step.optimizer, step.total)]
            table.add_row(stage.name, *times, f"{speed:,.0f}", f"{share:.0%}", *[_number(value / 1e9) for value in stage.traffic])
    return table


def print_layouts(case: Case, found: Found, console: Console) -> None:
    """The best of those that fit, then every other with its reason."""
    gpu = case.cluster.gpu.name if case.cluster.gpu else ""
    title = f"{len(found.fitting)} layouts of {found.processes} × {gpu} fit; the fastest"
    table = Table(title=title, title_justify="left")
    table.add_column("layout of the distillation")
    for header in ("teacher", "GiB a rank", "s a step", "of it waiting", "hours", "GPU-hours"):
        table.add_column(header, justify="right")
    steps = case.recipe.distill.steps
    for one in found.fitting[:BEST]:
        teacher = NONE if one.teacher is None else f"TP{one.teacher.tensor} PP{one.teacher.pipeline}"
        hours = steps * one.step.total / 3600
        sizes = (f"{one.memory.total / GIB:.1f}", f"{one.step.total:.2f}", f"{one.step.waiting:.2f}", _number(hours), _number(hours * found.processes))
        table.add_row(described(one.choice), teacher, *sizes)
    if found.fitting:
        console.print(table)
        console.print("The first one: " + " ".join(found.fitting[0].choice.overrides()), soft_wrap=True)
    else:
        console.print(f"No layout of {found.processes} × {gpu} fits.")
    refused = Table(title="Refused (in brackets micro-batch/recompute: n none, s selective, f full; none: all of them)", title_justify="left")
    refused.add_column("why")
    refused.add_column("number", justify="right")
    refused.add_column("which")
    for reason, choices in sorted(found.refused.items(), key=lambda item: -len(item[1])):
        refused.add_row(reason, str(len(choices)), grouped(choices))
    console.print(refused)


def _number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else f"{value:.2g}"
