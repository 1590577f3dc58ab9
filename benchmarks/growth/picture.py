"""Small multiples: time and memory of every curve, each relative to its first point, beside the line of what is linear."""

from __future__ import annotations

from collections.abc import Sequence

from growth.curve import Curve, Point, fit_memory
from matplotlib.axes import Axes

from minitron_megatron.results.svg import ACCENT, GRID, KEPT, MUTED, new_figure, standalone, style, to_svg

COLUMNS = 3


def growth_svg(drawn: Sequence[tuple[Curve, Sequence[Point]]]) -> str:
    """The file's text."""
    rows = -(-len(drawn) // COLUMNS)
    with style():
        figure = new_figure(0.6 + 1.25 * rows)
        grid = figure.subplots(rows, COLUMNS, squeeze=False)
        for axes in grid.flat[len(drawn) :]:
            axes.set_visible(False)
        for axes, (curve, points) in zip(grid.flat, drawn, strict=False):
            _panel(axes, curve, points)
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=3, labelcolor=MUTED)
        return standalone(to_svg(figure, "Time and memory against each size on logarithmic axes, with the line of linear growth"))


def _panel(axes: Axes, curve: Curve, points: Sequence[Point]) -> None:
    sizes = [point.size for point in points]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(sizes, [size / sizes[0] for size in sizes], color=GRID, linewidth=2.4, label="linear")
    axes.plot(sizes, [point.seconds / points[0].seconds for point in points], color=KEPT, marker="o", markersize=2.5, linewidth=1.2, label="time")
    if fit_memory(points) and points[0].megabytes:
        memory = [point.megabytes / points[0].megabytes for point in points]
        axes.plot(sizes, memory, color=ACCENT, marker="s", markersize=2.2, linewidth=1.0, label="memory")
    axes.set_title(curve.work, fontsize=7, pad=3)
    axes.set_xlabel(curve.quantity, fontsize=6.5, labelpad=1)
    axes.tick_params(labelsize=5.5, which="both", pad=1)
    axes.minorticks_off()
