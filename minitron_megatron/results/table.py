"""The table teacher / pruned / distilled: one source of rows for Markdown, the console and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

NOT_APPLICABLE = "–"
NO_BREAK = "\u00a0"
"""Space that keeps a number and its unit on one line."""
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Row:
    """One figure of every model; cells are ready to show, in the order of model_names()."""

    label: str
    cells: tuple[str, ...]
    better: str = ""
    """↓ or ↑: the direction that is better."""

    @property
    def heading(self) -> str:
        return f"{self.label}{NO_BREAK}{self.better}" if self.better else self.label


def model_names(result: dict[str, Any]) -> list[str]:
    """Columns of the table."""
    return list(result["models"])


def rows(result: dict[str, Any]) -> list[Row]:
    """All rows; one that no model has a figure for is left out."""
    return [row for row in _all_rows(result) if any(cell != NOT_APPLICABLE for cell in row.cells)]


def markdown_table(result: dict[str, Any]) -> str:
    """The table, and below it what was measured on how much."""
    names = model_names(result)
    lines = [markdown_line(["", *names]), markdown_line([":--", *("--:" for _ in names)])]
    lines += [markdown_line([row.heading, *row.cells]) for row in rows(result)]
    return "\n".join([*lines, "", note(result), ""])


def console_table(result: dict[str, Any]) -> Table:
    """The same table for rich."""
    table = Table(caption=note(result), caption_justify="left")
    table.add_column("")
    for name in model_names(result):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(result):
        table.add_row(row.heading, *row.cells)
    return table


def continuations(result: dict[str, Any]) -> str:
    """How each model goes on from the same prompt: a list, as Markdown and as plain text; empty without any."""
    texts = {name: model.get("continuation") for name, model in result["models"].items()}
    lines = [f"- {name}: {_verbatim(text)}" for name, text in texts.items() if text]
    return "\n".join([f"Continuations of {_verbatim(result['prompt'])}", "", *lines, ""]) if lines else ""


def note(result: dict[str, Any]) -> str:
    """On how much the figures were measured."""
    tokens = " and ".join(f"{count:,} tokens {spoken(domain)}" for domain, count in result.get("tokens", {}).items())
    parts = [f"Held out: {tokens}, in windows of {result['sequence_length']:,}"] if tokens else []
    parts += [*_task_items(result), *([result["remark"]] if "remark" in result else [])]
    return "; ".join([*parts, "± is one standard error"]) + "."


def _task_items(result: dict[str, Any]) -> list[str]:
    """task_items: a number for each task, or one number or "all" for every task."""
    tasks = list(dict.fromkeys(task for model in result["models"].values() for task in model.get("tasks") or {}))
    counts = result.get("task_items")
    if not tasks or not counts:
        return []
    if not isinstance(counts, dict):
        return ["tasks: all items" if counts == "all" else f"tasks: first {counts:,} items"]
    return ["task items: " + ", ".join(f"{count:,} of {task}" for task, count in counts.items())]


def quantity(figure: dict[str, Any] | None, *, scale: float = 1.0) -> str:
    """`value ± standard error`, the error with two significant digits, the value with the same decimals; – for None."""
    if not figure or figure.get("value") is None:
        return NOT_APPLICABLE
    value, stderr = figure["value"] * scale, figure.get("stderr")
    if not math.isfinite(value):
        return "not finite"
    if not stderr or not math.isfinite(stderr):
        return significant(value, 4)
    return _with_error(value, stderr * scale)


def significant(value: float, digits: int) -> str:
    """A number rounded to so many significant digits, never in powers of ten."""
    decimals = digits - 1 - _magnitude(value) if value else digits - 1
    return _rounded(value, decimals)


def short_count(count: int) -> str:
    """Parameters: 8.03 B, 134.5 M, 35.1 k."""
    for unit, size, decimals in (("B", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{decimals}f}{NO_BREAK}{unit}"
    return str(count)


def change(value: float, reference: float) -> str:
    """Relative change with a sign: −27.7 %."""
    percent = 100 * (value / reference - 1)
    return f"{'−' if percent < 0 else '+'}{abs(percent):.1f}{NO_BREAK}%"


def _all_rows(result: dict[str, Any]) -> Iterator[Row]:
    models = list(result["models"].values())
    yield Row("Parameters", _parameters(models))
    domains = list(dict.fromkeys(domain for model in models for domain in model["domains"]))
    for key, label, better, scale in (
        ("perplexity", "Perplexity", "↓", 1),
        ("kl", "KL to the teacher (nats/token)", "↓", 1),
        ("top1_agreement", "Top-1 agreement (%)", "↑", 100),
    ):
        for domain in domains:
            figures = (model["domains"].get(domain, {}).get(key) for model in models)
            yield Row(f"{label}, {spoken(domain)}", tuple(quantity(figure, scale=scale) for figure in figures), better)
    for task in dict.fromkeys(task for model in models for task in model.get("tasks") or {}):
        for metric in METRICS:
            figures = ((model.get("tasks") or {}).get(task, {}).get(metric) for model in models)
            yield Row(f"{task}, {metric} (%)", tuple(quantity(figure, scale=100) for figure in figures), "↑")
    yield Row("Forward tokens/s", _speeds(models), "↑")


def _parameters(models: list[dict[str, Any]]) -> tuple[str, ...]:
    counts = [model["parameters"] for model in models]
    changes = [f" ({change(count, counts[0])})" if count != counts[0] else "" for count in counts]
    return tuple(short_count(count) + change_text for count, change_text in zip(counts, changes, strict=True))


def _speeds(models: list[dict[str, Any]]) -> tuple[str, ...]:
    speeds = [model.get("tokens_per_second") for model in models]
    return tuple(significant(speed, 3) if speed else NOT_APPLICABLE for speed in speeds)


def _with_error(value: float, stderr: float) -> str:
    decimals = 1 - _magnitude(stderr)
    # 0.0996 rounds to 0.10: one decimal fewer keeps two digits
    decimals -= _magnitude(round(stderr, decimals)) > _magnitude(stderr)
    return f"{_rounded(value, decimals)} ± {_rounded(stderr, decimals)}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def _rounded(value: float, decimals: int) -> str:
    text = f"{round(value, decimals):,.{max(decimals, 0)}f}"
    return text.replace("-", "−")


def spoken(domain: str) -> str:
    return domain.replace("_", " ")


def _verbatim(text: str) -> str:
    """One line in a code span, so that nothing in a model's text is taken for Markdown."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def markdown_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
