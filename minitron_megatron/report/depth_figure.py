"""What the model is without each layer or block, and which ones went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from minitron_megatron.results.svg import CUT, INK, KEPT, MUTED, legend_above, new_figure, style, to_svg

Candidate = dict[str, Any]
"""layers, value, stderr"""


def depth_figure(depth: dict[str, Any]) -> str:
    """The first choice's candidates with standard errors; those that went, then or later, in another colour.

    depth: depth.json. Blocks stand at their first layer; numbers tell in which order layers went one after another.
    """
    candidates, order = depth["rounds"][0]["candidates"], depth["order"]
    gone = [layers for item in depth["rounds"] for layers in item["chosen"]]
    with style():
        figure = new_figure(2.6)
        axes = figure.subplots()
        _points(axes, [item for item in candidates if item["layers"] not in gone], KEPT, "kept")
        _points(axes, [item for item in candidates if item["layers"] in gone], CUT, "dropped")
        if depth["removal"] == "greedy":
            _numbers(axes, candidates, order)
        if depth["baseline"] is not None and depth["criterion"] != "logit_error":
            axes.axhline(depth["baseline"]["value"], color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)), label="whole model")
        if _is_wide([item["value"] for item in candidates]):
            axes.set_yscale("log")  # without its first layer a model is often lost
        in_blocks = depth["removal"] == "block" and len(order) > 1
        axes.set(xlabel=f"first of the {len(order)} layers that are left out" if in_blocks else "layer", ylabel=depth["unit"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        legend_above(axes, 3)
        return to_svg(figure, "What the model is without each layer or block, with standard errors; dropped ones in another colour")


def _points(axes: Axes, candidates: Sequence[Candidate], colour: str, label: str) -> None:
    places, values = [item["layers"][0] for item in candidates], [item["value"] for item in candidates]
    errors = [item["stderr"] or 0.0 for item in candidates]
    axes.errorbar(places, values, yerr=errors, color=colour, label=label, linestyle="none", marker="o", markersize=4, elinewidth=1.2)


def _numbers(axes: Axes, candidates: Sequence[Candidate], order: Sequence[int]) -> None:
    for item in candidates:
        (layer,) = item["layers"]
        if layer in order:
            place = layer, item["value"]
            axes.annotate(str(order.index(layer) + 1), place, xytext=(4, 4), textcoords="offset points", color=INK, fontsize=8)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 10 * float(np.median(values))
