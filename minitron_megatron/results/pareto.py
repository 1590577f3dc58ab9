"""The trained candidates of a search, cost against loss, out of its ranking.json; and the rows of its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from minitron_megatron.results.svg import CUT, INK, KEPT, MUTED, legend_above, new_figure, style, to_svg
from minitron_megatron.results.table import NO_BREAK, NOT_APPLICABLE, quantity, short_count, significant

COSTS = {"latency": "latency of a request, ms", "memory": "weights and KV cache, GiB", "parameters": "parameters"}
"""The cost that is drawn is the first of these that the search knows."""
LOSSES = {"cross_entropy": "LM loss", "forward_kl": "KL to the teacher"}
Candidate = dict[str, Any]


def pareto_svg(ranking: dict[str, Any]) -> str:
    """Losses of every candidate after the first round (hollow) and of those in the last (solid), ± 2 standard errors."""
    candidates, steps = ranking["candidates"], ranking["rounds"]
    cost = cost_of(candidates)
    with style():
        figure = new_figure(3.4)
        axes = figure.subplots()
        first = [item for item in candidates if str(steps[0]) in item["losses"]]
        last = [item for item in candidates if str(steps[-1]) in item["losses"]]
        if len(steps) > 1:
            _points(axes, first, ranking, steps[0], cost, colour=MUTED, hollow=True)
        _points(axes, last, ranking, steps[-1], cost, colour=KEPT, hollow=False)
        front = pareto_front([(item["figures"][cost], _loss(item, ranking, steps[-1])["value"]) for item in last])
        axes.plot(*zip(*front, strict=True), color=KEPT, linewidth=1.0, label="Pareto front")
        chosen = next(item for item in last if item["verdict"] == "chosen")
        place = (chosen["figures"][cost], _loss(chosen, ranking, steps[-1])["value"])
        axes.plot(*place, marker="o", markersize=11, markerfacecolor="none", color=CUT, linestyle="none", label="chosen")
        cheap, dear = min(item["figures"][cost] for item in last), max(item["figures"][cost] for item in last)
        right = place[0] > (cheap + dear) / 2  # the name stays within the axes
        axes.annotate(chosen["name"], place, xytext=(-9 if right else 9, -12), textcoords="offset points", color=INK, ha="right" if right else "left")
        axes.set(xlabel=COSTS[cost], ylabel=f"{LOSSES[ranking['rank_by']]}, nats/token")
        axes.margins(0.12)
        legend_above(axes, 4)
        return to_svg(figure, f"Candidates of the search: {COSTS[cost]} against {LOSSES[ranking['rank_by']]}, with error bars and the Pareto front")


def cost_of(candidates: Sequence[Candidate]) -> str:
    return next(name for name in COSTS if name in candidates[0]["figures"])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def ranking_table(ranking: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: shape, costs, loss after each round, difference to the chosen one over the same windows, verdict."""
    costs = [name for name in ("latency", "memory") if name in ranking["candidates"][0]["figures"]]
    units = {"latency": "latency, ms", "memory": "memory, GiB"}
    after = [f"loss at step {step}" if step else "right after pruning" for step in ranking["steps"]]
    header = ["candidate", "parameters", *(units[name] for name in costs), *after, "difference to the chosen", "verdict"]
    rows = []
    for item in ranking["candidates"]:
        losses = [quantity(_loss(item, ranking, step)) if str(step) in item["losses"] else NOT_APPLICABLE for step in ranking["steps"]]
        figures = [significant(item["figures"][name], 4) for name in costs]
        rows.append([item["name"], short_count(int(item["figures"]["parameters"])), *figures, *losses, _difference(item), item["verdict"]])
    return header, rows


def ranking_note(ranking: dict[str, Any]) -> str:
    """What the figures are, and how far the order right after pruning told the order after training."""
    note = (
        f"{LOSSES[ranking['rank_by']]} on {ranking['windows']} held-out windows, ± one standard error; differences are paired over the same windows, "
        "at the last step that both have, and noise where they are within two standard errors. The errors are those of the text: how far a loss "
        "would be another after training with another seed is not in them."
    )
    changed = ranking["order_changes"]
    if changed and changed["pairs"]:
        note += f" From step {changed['from']} to step {changed['to']}, {changed['swapped']} of {changed['pairs']} pairs changed their order."
    return note


def ranking_markdown(ranking: dict[str, Any]) -> str:
    header, rows = ranking_table(ranking)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, [":--", *("--:" for _ in header[2:]), ":--"], *rows)]
    return "\n".join([*lines, "", ranking_note(ranking), ""])


def _difference(item: Candidate) -> str:
    found = item["difference"]
    if found is None:
        return NOT_APPLICABLE
    return f"{quantity({'value': found['value'], 'stderr': found['stderr']})}{NO_BREAK}(step {found['step']})"


def _loss(item: Candidate, ranking: dict[str, Any], step: int) -> dict[str, float]:
    return item["losses"][str(step)][ranking["rank_by"]]


def _points(axes: Axes, items: Sequence[Candidate], ranking: dict[str, Any], step: int, cost: str, *, colour: str, hollow: bool) -> None:
    found = [_loss(item, ranking, step) for item in items]
    axes.errorbar(
        [item["figures"][cost] for item in items],
        [loss["value"] for loss in found],
        yerr=[2 * loss["stderr"] for loss in found],
        linestyle="none",
        marker="o",
        markersize=5,
        color=colour,
        markerfacecolor="none" if hollow else colour,
        elinewidth=1.0,
        label=f"after {step} steps" if step else "right after pruning",
    )
