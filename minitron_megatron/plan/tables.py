"""The plan as a person reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from minitron_megatron.plan.case import Case
from minitron_megatron.plan.gpus import GIB, KEPT_FREE_GIB, Accelerator
from minitron_megatron.plan.layouts import Found, described, grouped
from minitron_megatron.plan.stages import StagePlan
from minitron_megatron.plan.time import StepTime
from minitron_megatron.plan.traffic import Traffic

BEST = 12
"""Fitting layouts that are shown."""
NONE = "–"


def print_plan(case: Case, stages: Sequence[StagePlan], console: Console) -> None:
    """Every stage in a row; then memory by what it is for, time and traffic of those that train."""
    console.print(stage_table(case, stages))
    for stage in stages:
        if stage.note:
            console.print(f"{stage.name}: {stage.note}", highlight=False)
    limit = case.memory_limit
    if limit is None:
        console.print("No GPU is planned for: memory as on a CPU, no time. A cluster file with `gpu:` (cluster=FILE) or --gpu NAME names one.")
    console.print(memory_table(case, stages))
    for line in warnings(case, stages):
        console.print(line)
    if any(stage.step for stage in stages):
        console.print(step_table(case, stages))


def stage_table(case: Case, stages: Sequence[StagePlan]) -> Table:
    """A row for each stage, and their sum where hours are known."""
    cluster, parallel = case.cluster, case.recipe.parallel
    where = f"{parallel.processes} × {cluster.gpu.name}" if case.kernels == "cuda" and cluster.gpu else f"{parallel.processes} CPU processes"
    context = f" × context {parallel.context}" if parallel.context > 1 else ""
    sizes = f"tensor {parallel.tensor}{context} × pipeline {parallel.pipeline} × data {parallel.data}"
    numbers = f"{case.precision} and FP8" if case.in_fp8 else case.precision
    table = Table(title=f"{case.recipe.name}: the stages on {where} ({sizes}, {numbers})", title_justify="left")
    table.add_column("stage", no_wrap=True)
    for header in ("tokens", "EFLOP", "GiB a rank", "s a step", "hours", "GPU hours", "GB on disk"):
        table.add_column(header, justify="right")
    for stage in stages:
        table.add_row(*_row(stage))
    hours, gpu_hours = sum(stage.seconds or 0 for stage in stages) / 3600, sum(stage.gpu_hours or 0 for stage in stages)
    if hours:
        table.add_section()
        flops, disk = sum(stage.flops or 0 for stage in stages), sum(stage.written or 0 for stage in stages)
        table.add_row("all", "", _number(flops / 1e18), "", "", _number(hours), _number(gpu_hours), _number(disk / 1e9))
    return table


def _row(stage: StagePlan) -> tuple[str, ...]:
    return (
        stage.name,
        NONE if stage.tokens is None else _tokens(stage.tokens),
        NONE if stage.flops is None else _number(stage.flops / 1e18),
        NONE if stage.memory is None else f"{stage.memory.total / GIB:.2f}",
        NONE if stage.step is None else _number(stage.step.total),
        NONE if stage.seconds is None else _number(stage.seconds / 3600),
        NONE if stage.gpu_hours is None else _number(stage.gpu_hours),
        NONE if stage.written is None else _number(stage.written / 1e9),
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
    shares, rows = case.shares, {}
    for stage in stages:
        if stage.step and stage.traffic and stage.tokens and stage.flops and case.cluster.gpu:
            rows[stage.name] = _step_rows(stage, stage.step, stage.traffic, case.cluster.gpu)
    fp8 = f" ({shares.matrix_fp8:.0%} of the FP8 peak in those of layers: a guess)" if case.in_fp8 else ""
    counted = f"{shares.matrix:.0%} of the peak in matrix products{fp8}, {shares.memory:.0%} of memory's and {shares.links:.0%} of links' bandwidth"
    table = Table(title=f"One step, at {counted} (assumed, not measured)", title_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for label in next(iter(rows.values())):
        table.add_row(label, *[values[label] for values in rows.values()])
    return table


def _step_rows(stage: StagePlan, step: StepTime, traffic: Traffic, gpu: Accelerator) -> dict[str, str]:
    tokens, flops = (stage.tokens or 0) / stage.steps, (stage.flops or 0) / stage.steps
    seconds = {
        "passes of all models": step.passes,
        "of it waiting for other stages": step.waiting,
        "gradients and weights over replicas, not hidden": step.reduction,
        "optimizer": step.optimizer,
        "all": step.total,
    }
    sent = {"tensor": traffic.tensor, "pipeline": traffic.pipeline, "data": traffic.data, "teacher's states": traffic.states}
    return {
        "steps": f"{stage.steps:,}",
        **{f"seconds: {name}": _number(value) for name, value in seconds.items()},
        "tokens a second and GPU": f"{tokens / step.total / stage.processes:,.0f}",
        "share of the GPU's bf16 peak": f"{flops / step.total / stage.processes / gpu.gpu.flops['bf16']:.0%}",
        **{f"GB that the busiest rank sends: {name}": _number(value / 1e9) for name, value in sent.items()},
    }


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
        sizes = (
            f"{one.memory.total / GIB:.1f}",
            f"{one.step.total:.2f}",
            f"{one.step.waiting:.2f}",
            _number(hours),
            _number(hours * found.processes),
        )
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
    for reason, choices in sorted(found.refused.items(), key=lambda item: _least(item[0])):
        refused.add_row(reason, str(len(choices)), grouped(choices))
    console.print(refused)


def _least(reason: str) -> tuple[bool, int]:
    """The recipe's own checks first, then what needs memory, little before much."""
    needs = re.match(r"needs (\d+) to", reason)
    return needs is not None, int(needs[1]) if needs else 0


def _number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else f"{value:.2g}"


def _tokens(count: int) -> str:
    return f"{count / 1e9:,.1f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"
