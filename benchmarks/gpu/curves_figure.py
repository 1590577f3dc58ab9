"""Two panels over the tokens seen: KL to the teacher and perplexity of held-out text, a line for each precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from minitron_megatron.results.svg import ACCENT, CUT, KEPT, MUTED, new_figure, standalone, style, to_svg

LINES = ((KEPT, "-"), (CUT, "--"), (ACCENT, ":"), (MUTED, "-."))
"""Told apart without colours too."""


def curves_svg(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The file's text. points: of each precision its validations."""
    with style():
        figure = new_figure(2.6)
        for axes, (field, title) in zip(
            figure.subplots(1, 2), (("forward_kl", "KL to the teacher, nats"), ("perplexity", "perplexity")), strict=True
        ):
            for (colour, line), (name, found) in zip(LINES, points.items(), strict=False):
                axes.plot(
                    [point["tokens"] / 1e6 for point in found], [point[field] for point in found], line, color=colour, linewidth=1.3, label=name
                )
            _dressed(axes, title)
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=len(points), labelcolor=MUTED)
        return standalone(to_svg(figure, "KL to the teacher and perplexity of held-out text over the tokens of a distillation, by precision"))


def _dressed(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_yscale("log")
    axes.set_xlabel("million tokens")
