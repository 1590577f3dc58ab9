"""The simulated step of each order: how long it takes, and as a Gantt picture."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from matplotlib.axes import Axes

from minitron_megatron.results.svg import ACCENT, CARD, CUT, KEPT, MUTED, new_figure, style, to_svg
from minitron_megatron.schedule.simulate import Kind, Order, StageWorks, Timeline, orders_of, simulate, step_time

NAMES: dict[Order, str] = {
    "teacher_on_one_rank": "teacher whole on each rank, its micro-batches dealt out",
    "teacher_pipelined": "teacher in a pipeline of its own, ahead of the student's",
    "one_schedule": "both in one schedule, a forward is one of each",
}
COLOURS: dict[Kind, str] = {"teacher": ACCENT, "forward": KEPT, "backward": CUT}
WORDS: dict[Kind, str] = {"teacher": "teacher forward", "forward": "student forward", "backward": "student backward"}
NUMBERED = 0.015
"""Share of the picture's width from which on a pass has room for its micro-batch's number."""


class Row(NamedTuple):
    """A pipeline of so many ranks: what a step takes over the ideal, in which no rank waits."""

    ranks: int
    micro_batches: int
    over_ideal: dict[Order, float]
    """Of the orders that exist with so many virtual stages."""
    virtual: int = 1


def row(works: StageWorks, micro_batches: int) -> Row:
    ideal = works.ideal(micro_batches)
    over_ideal = {order: step_time(simulate(works, micro_batches, order)) / ideal for order in orders_of(works.virtual)}
    return Row(works.ranks, micro_batches, over_ideal, works.virtual)


def gantt_svg(works: StageWorks, micro_batches: int) -> str:
    """One strip for each order, ranks from top to bottom, on a common axis of time."""
    timelines = {order: simulate(works, micro_batches, order) for order in orders_of(works.virtual)}
    ideal, longest = works.ideal(micro_batches), max(map(step_time, timelines.values()))
    with style():
        figure = new_figure(1.1 + len(timelines) * (0.55 + 0.16 * works.ranks))
        strips = figure.subplots(len(timelines), sharex=True)
        for axes, (order, timeline) in zip(strips, timelines.items(), strict=True):
            _draw(axes, timeline, works.ranks, numbered_from=NUMBERED * longest)
            axes.axvline(ideal, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), label="ideal: no rank waits")
            axes.set_title(f"{NAMES[order]}: {step_time(timeline) / ideal:.2f} × ideal", pad=3)
        strips[-1].set(xlabel="forward passes of one student layer", xlim=(0, longest * 1.01))
        handles, labels = strips[0].get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=2, labelcolor=MUTED, frameon=False)
        stages = f"{works.ranks} ranks{f' with {works.virtual} virtual stages each' if works.virtual > 1 else ''}"
        return to_svg(figure, f"When each of {stages} works in a step of {micro_batches} micro-batches, under {len(timelines)} schedules")


def _draw(axes: Axes, timeline: Timeline, ranks: int, *, numbered_from: float) -> None:
    for (kind, colour), chunk in product(COLOURS.items(), sorted({which.chunk for which in timeline})):
        spans = {which: span for which, span in timeline.items() if which.kind == kind and which.chunk == chunk}
        axes.barh(
            [which.rank for which in spans],
            [span.end - span.start for span in spans.values()],
            left=[span.start for span in spans.values()],
            height=0.82,
            color=colour,
            edgecolor=CARD,
            linewidth=0.5,
            alpha=1 - 0.5 * chunk / (chunk + 1),  # chunks behind the first one are paler
            label=WORDS[kind] if spans and not chunk else None,
        )
        for which, span in spans.items():
            if span.end - span.start >= numbered_from:
                axes.text((span.start + span.end) / 2, which.rank, str(which.micro_batch), ha="center", va="center", color=CARD, fontsize=6)
    axes.grid(False)
    axes.set(ylabel="rank", yticks=range(ranks), ylim=(ranks - 0.5, -0.5))
