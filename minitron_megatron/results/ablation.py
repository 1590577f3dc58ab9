"""The variants of an ablation beside each other: mean and spread over seeds of each one's final model, and the best where it is one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from minitron_megatron.artifact import write_json
from minitron_megatron.results.table import METRICS, NO_BREAK, NOT_APPLICABLE, markdown_line, note, quantity, short_count, spoken

SAME_SIZE = 0.01
"""Variants whose parameters differ by less are held against each other."""
TEACHER = "teacher"
Run = tuple[int | None, dict[str, Any]]
"""Seed and result of the stage evaluate."""


class Column(NamedTuple):
    """One figure of every variant."""

    domain: str
    """Or the task."""
    key: str
    heading: str
    better: str
    """↓ or ↑."""
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.key}, {self.domain}"


def ablation_result(name: str, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Variant → its runs, to one result; the KL of a variant with another teacher than the first one's is left out."""
    first = next(iter(runs.values()))[0][1]
    kept = ("tokens", "sequence_length", "task_items", "precision")
    return {
        "ablation": name,
        **{key: first[key] for key in kept if key in first},
        "teacher": first["models"][TEACHER],
        "variants": {variant: _variant(some, first["models"][TEACHER]) for variant, some in runs.items()},
    }


def publish_ablation(name: str, runs: Mapping[str, Sequence[Run]], folder: Path) -> dict[str, Any]:
    """Writes ablation.md and ablation.json; returns the result."""
    result = ablation_result(name, runs)
    (folder / "ablation.md").write_text(markdown_ablation(result))
    write_json(folder / "ablation.json", result)
    return result


def markdown_ablation(result: dict[str, Any]) -> str:
    header, *lines = _cells(result, bold="**{}**")
    rows = [markdown_line(header), markdown_line([":--", *("--:" for _ in header[1:])]), *map(markdown_line, lines)]
    return "\n".join([*rows, "", _legend(result), ""])


def console_ablation(result: dict[str, Any]) -> Table:
    """The same table for rich."""
    header, *lines = _cells(result, bold="[bold]{}[/bold]")
    table = Table(caption=_legend(result), caption_justify="left")
    for number, heading in enumerate(header):
        table.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
    for line in lines:
        table.add_row(*line)
    return table


def best_variants(result: dict[str, Any], column: Column) -> set[str]:
    """Variants that are better than each other one of their size by more than both spreads together (root of the sum of squares)."""
    figures = {name: variant["figures"].get(column.name) for name, variant in result["variants"].items()}
    return {name for name in figures if _wins(name, figures, result["variants"], 1 if column.better == "↑" else -1)}


def columns_of(result: dict[str, Any]) -> list[Column]:
    """Those that a variant has a figure for."""
    teacher, found = result["teacher"], []
    for domain in teacher["domains"]:
        found.append(Column(domain, "kl", f"KL to the teacher, {spoken(domain)}", "↓"))
        found.append(Column(domain, "perplexity", f"Perplexity, {spoken(domain)}", "↓"))
    for task in teacher.get("tasks") or {}:
        found += [Column(task, metric, f"{task}, {metric} (%)", "↑", 100) for metric in METRICS]
    return [column for column in found if any(column.name in variant["figures"] for variant in result["variants"].values())]


def _variant(runs: Sequence[Run], teacher: dict[str, Any]) -> dict[str, Any]:
    results = [result for _, result in runs]
    model = list(results[0]["models"])[-1]
    finals = [result["models"][model] for result in results]
    own_teacher = all(_same_model(result["models"][TEACHER], teacher) for result in results)
    figures = {
        f"{key}, {where}": _together([final[kind][where][key] for final in finals])
        for kind in ("domains", "tasks")
        for where, values in (finals[0].get(kind) or {}).items()
        for key, value in values.items()
        if isinstance(value, dict) and (own_teacher or key in ("perplexity", *METRICS))
    }
    return {"model": model, "parameters": finals[0]["parameters"], "seeds": [seed for seed, _ in runs], "figures": figures}


def _same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The layout of a run may round a perplexity otherwise, no more."""
    perplexities = [[values["perplexity"]["value"] for values in model["domains"].values()] for model in (one, other)]
    return one["parameters"] == other["parameters"] and all(math.isclose(a, b, rel_tol=1e-2) for a, b in zip(*perplexities, strict=False))


def _together(figures: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, no number where a seed has none; of one run its figure with the measurement's error."""
    values, errors = [figure["value"] for figure in figures], [figure.get("stderr") for figure in figures]
    if len(values) == 1:
        return {"value": values[0], "spread": errors[0], "spread_is": "standard error of the measurement"}
    deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    spread = {"spread": deviation, "spread_is": "standard deviation over seeds"}
    return {"value": statistics.fmean(values), **spread, "values": values, "stderrs": errors}


def _wins(name: str, figures: dict[str, Any], variants: dict[str, Any], sign: int) -> bool:
    own, size = figures[name], variants[name]["parameters"]
    rivals = [figures[other] for other in figures if other != name and abs(variants[other]["parameters"] / size - 1) < SAME_SIZE]
    return own is not None and bool(rivals) and all(_beats(own, rival, sign) for rival in rivals)


def _beats(own: dict[str, Any], rival: dict[str, Any] | None, sign: int) -> bool:
    if rival is None:
        return False
    apart = sign * (own["value"] - rival["value"])
    return apart > math.hypot(own["spread"] or 0, rival["spread"] or 0)  # never true of what is not finite


def _cells(result: dict[str, Any], *, bold: str) -> list[list[str]]:
    """The header and a line for the teacher and for every variant."""
    columns, variants = columns_of(result), result["variants"]
    best = [best_variants(result, column) for column in columns]
    lines = [["", "Seeds", "Parameters", *(f"{column.heading}{NO_BREAK}{column.better}" for column in columns)]]
    lines.append(
        [TEACHER, NOT_APPLICABLE, short_count(result["teacher"]["parameters"]), *(_of_teacher(result["teacher"], column) for column in columns)]
    )
    for name, variant in variants.items():
        figures = [quantity(_as_quantity(variant["figures"].get(column.name)), scale=column.scale) for column in columns]
        told = [bold.format(text) if name in winners else text for text, winners in zip(figures, best, strict=True)]
        seeds = [seed for seed in variant["seeds"] if seed is not None]
        lines.append([_named(name, variant, variants), str(len(seeds)) if seeds else NOT_APPLICABLE, short_count(variant["parameters"]), *told])
    return lines


def _named(name: str, variant: dict[str, Any], variants: dict[str, Any]) -> str:
    """With the model that its figures are of, where variants end at different ones."""
    return name if len({other["model"] for other in variants.values()}) == 1 else f"{name} ({variant['model']})"


def _of_teacher(teacher: dict[str, Any], column: Column) -> str:
    kind = "tasks" if column.better == "↑" else "domains"
    return quantity((teacher.get(kind) or {}).get(column.domain, {}).get(column.key), scale=column.scale)


def _as_quantity(figure: dict[str, Any] | None) -> dict[str, Any] | None:
    return figure and {"value": figure["value"], "stderr": figure["spread"]}


def _legend(result: dict[str, Any]) -> str:
    measured = note(
        {"models": {"teacher": result["teacher"]}, **{key: result[key] for key in ("tokens", "sequence_length", "task_items") if key in result}}
    )
    variants = result["variants"].values()
    models = {variant["model"] for variant in variants}
    seeded = [len(variant["seeds"]) > 1 for variant in variants]
    spreads = {True: "the sample standard deviation over seeds", False: "one standard error of the measurement"}
    how = spreads[all(seeded)] if all(seeded) or not any(seeded) else f"{spreads[True]} where there are several, else {spreads[False]}"
    whose = f"Figures of the {next(iter(models))} model. " if len(models) == 1 else ""
    return (
        whose + measured.removesuffix("± is one standard error.") + f"KL in nats a token; ± is {how}; "
        f"bold: better than every other variant of its size (within {SAME_SIZE:.0%}) by more than both ± together."
    )
