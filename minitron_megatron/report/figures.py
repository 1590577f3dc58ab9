"""The report's figures, out of plain lists and arrays, as inline SVG.

Legend: L layers, F ffn neurons (or any other unit of a layer), S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from minitron_megatron.results.svg import (
    ACCENT,
    CARD,
    CUT,
    GRID,
    INK,
    KEPT,
    MUTED,
    SOFT,
    legend_above,
    new_figure,
    style,
    to_svg,
)

Floats = NDArray[np.float64]
MOST_POINTS = 400
"""Points of a curve: more would not be seen, and a run of 100 000 steps must not make a page of 10 MB."""
MOST_COLUMNS = 320
"""Columns of a heat map."""


@dataclass(frozen=True)
class Kept:
    """What is kept of one kind of unit (FFN neurons, query heads) in each source layer."""

    title: str
    total: int
    kept_L: list[int | None]
    """None where the whole layer is dropped."""


KLS = ("forward_kl", "forward_kl_top_k", "forward_kl_sampled")
"""The last two of a teacher's stored outputs, where the first is not known."""


def kl_curve(steps: Sequence[dict[str, Any]]) -> str:
    """KL to the teacher (nats/token) of each training step and at validation, over the learning rate in small."""
    name = next((name for name in KLS if any(name in step for step in steps)), KLS[0])
    trained = [step for step in steps if name in step]
    with style():
        figure = new_figure(3.2)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        if trained:
            _noisy_line(upper, *_curve(trained, name), "training (per step, and smoothed)")
            lower.plot(*_curve(trained, "learning_rate"), color=MUTED, linewidth=1.3)
        _validation_points(upper, steps, name, CUT)
        upper.set_ylabel("KL, nats/token")
        upper.set_ylim(bottom=0)
        legend_above(upper, 3)
        lower.set(ylabel="LR", xlabel="step", ylim=(0, None))
        lower.yaxis.set_major_locator(MaxNLocator(2))
        lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        figure.align_ylabels()
        return to_svg(figure, "KL to the teacher over training steps, with validation points and the learning rate")


def perplexity_curve(steps: Sequence[dict[str, Any]]) -> str:
    """Validation perplexity, over the gradient norm of each step in small."""
    trained = [step for step in steps if "gradient_norm" in step]
    with style():
        figure = new_figure(3.2)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        _validation_points(upper, steps, "perplexity", ACCENT)
        upper.set_ylabel("perplexity")
        legend_above(upper, 2)
        if trained:
            lower.plot(*_curve(trained, "gradient_norm"), color=MUTED, linewidth=1.0)
        lower.set(ylabel="|g|", xlabel="step", ylim=(0, None))
        lower.yaxis.set_major_locator(MaxNLocator(2))
        figure.align_ylabels()
        return to_svg(figure, "Validation perplexity over training steps, with the gradient norm")


def importance_heatmap(scores_LF: Sequence[Floats], kept_L: Sequence[int | None], *, unit: str = "FFN neuron") -> str:
    """Scores sorted within each layer, as shares of its largest; a line marks the cut, dropped layers are faded.

    scores_LF: for each layer [F] scores ≥ 0. kept_L: units kept in each layer, None where the layer is dropped.
    """
    layers, units = len(scores_LF), max(len(scores_F) for scores_F in scores_LF)
    image = np.stack([_sorted_profile(scores_F, min(units, MOST_COLUMNS)) for scores_F in scores_LF])
    with style():
        figure = new_figure(_height_of_layers(layers))
        axes = figure.subplots()
        axes.grid(False)
        # square root: most neurons lie far below a layer's strongest, a linear scale shows them all alike
        picture = axes.imshow(
            image,
            aspect="auto",
            extent=(0, units, layers - 0.5, -0.5),
            cmap="viridis",
            norm=PowerNorm(0.5, 0, 1),
            interpolation="none",
        )
        _mark_cut(axes, kept_L, units)
        axes.set(xlabel=f"{unit}s of a layer, highest score first", ylabel="layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bar = figure.colorbar(picture, ax=axes, pad=0.02, aspect=28, ticks=[0, 0.1, 0.25, 0.5, 1])
        bar.set_label("score / layer's largest")
        bar.outline.set_visible(False)
        return to_svg(figure, f"Heat map of importance scores, one row per layer, {unit}s sorted, with the cut marked")


def block_influence_bars(influence_L: Sequence[float], dropped: Sequence[int]) -> str:
    """Block Influence of each layer (1 − cosine of its input and output); dropped layers in another colour."""
    gone = set(dropped)
    with style():
        figure = new_figure(_height_of_layers(len(influence_L)) * 0.92)
        axes = figure.subplots()
        layers = range(len(influence_L))
        colours = [CUT if layer in gone else KEPT for layer in layers]
        axes.bar(layers, list(influence_L), color=colours, width=0.74)
        if max(influence_L) > 20 * float(np.median(influence_L)) > 0:
            axes.set_yscale("log")  # the first layer often changes its input tenfold more than any other
        axes.set(xlabel="layer", ylabel="Block Influence")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.margins(x=0.01)
        handles = [Patch(color=KEPT, label="kept")] + ([Patch(color=CUT, label="dropped")] if gone else [])
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2, labelcolor=MUTED)
        return to_svg(figure, "Bar chart of Block Influence, one bar per layer; dropped layers in another colour")


def kept_strips(kinds: Sequence[Kept]) -> str:
    """What is kept of each layer: one strip per kind of unit, the share kept filled, dropped layers hatched."""
    with style():
        figure = new_figure(0.8 + 1.5 * len(kinds))
        strips = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        for axes, kind in zip(strips, kinds, strict=True):
            _strip(axes, kind)
        strips[-1].set_xlabel("layer of the source")
        strips[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        handles = [
            Patch(color=KEPT, label="kept"),
            Patch(color=SOFT, label="cut"),
            Patch(facecolor="none", edgecolor=CUT, hatch="////", label="layer dropped"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, labelcolor=MUTED)
        return to_svg(
            figure,
            "Share of FFN neurons and query heads that is kept, for each layer of the source; dropped layers hatched",
        )


def _strip(axes: Axes, kind: Kept) -> None:
    layers = np.arange(len(kind.kept_L))
    kept = np.array([count or 0 for count in kind.kept_L])
    dropped = np.array([count is None for count in kind.kept_L])
    axes.bar(layers[~dropped], np.full((~dropped).sum(), kind.total), color=SOFT, width=0.8)
    axes.bar(layers[~dropped], kept[~dropped], color=KEPT, width=0.8)
    axes.bar(
        layers[dropped],
        np.full(dropped.sum(), kind.total),
        facecolor="none",
        edgecolor=CUT,
        hatch="////",
        width=0.8,
        linewidth=0.8,
    )
    axes.set_title(kind.title, pad=4)
    axes.set_ylim(0, kind.total)
    axes.set_yticks([0, kind.total])
    axes.margins(x=0.01)
    axes.spines["left"].set_visible(False)


def _mark_cut(axes: Axes, kept_L: Sequence[int | None], units: int) -> None:
    for layer, count in enumerate(kept_L):
        if count is None:
            axes.fill_betweenx([layer - 0.5, layer + 0.5], 0, units, facecolor=CARD, alpha=0.72, linewidth=0)
            axes.text(units * 0.985, layer, "dropped", ha="right", va="center", fontsize=7, color=INK)
    kept = [count for count in kept_L if count is not None]
    if kept and min(kept) < units:
        # NaN: the line stops at a dropped layer
        x = np.repeat([np.nan if count is None else count for count in kept_L], 2)
        y = np.repeat(np.arange(len(kept_L)), 2) + np.tile([-0.5, 0.5], len(kept_L))
        # outlined: seen on dark and on light cells
        axes.plot(x, y, color="#000000", linewidth=3.2, solid_capstyle="butt")
        axes.plot(x, y, color="#ffffff", linewidth=1.5, solid_capstyle="butt")
        axes.set_title(f"white line: the cut, {_span(kept)} of {units:,} kept", pad=4, color=MUTED)


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _sorted_profile(scores_F: Floats, columns: int) -> Floats:
    """Scores from high to low as shares of the largest, as block means of so many columns."""
    descending = np.sort(np.asarray(scores_F, dtype=np.float64))[::-1]
    largest = descending[0] if descending[0] > 0 else 1.0
    return _block_means(descending / largest, columns)


def _height_of_layers(layers: int) -> float:
    return min(max(1.1 + 0.072 * layers, 2.2), 6.5)


def _noisy_line(axes: Axes, step_S: Floats, value_S: Floats, label: str) -> None:
    axes.plot(step_S, value_S, color=KEPT, linewidth=0.7, alpha=0.45)
    axes.plot(step_S, _smoothed(value_S), color=KEPT, linewidth=1.8, label=label)


def _validation_points(axes: Axes, steps: Sequence[dict[str, Any]], key: str, colour: str) -> None:
    points = [(step["step"], step["validation"][key]) for step in steps if key in (step.get("validation") or {})]
    if not points:
        return
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=1.2,
        linestyle=(0, (4, 2)),
        marker="o",
        markersize=4.5,
        label="validation",
        zorder=3,
    )
    for position in {0, len(points) - 1}:
        right = position == len(points) - 1 and position > 0
        axes.annotate(
            f"{y[position]:.3g}", (x[position], y[position]), xytext=(0 if right else 6, 7), textcoords="offset points",
            ha="right" if right else "left", color=INK, fontweight="bold", fontsize=9,
        )  # fmt: skip
    axes.grid(axis="y", color=GRID)
    axes.margins(y=0.12)


def _curve(steps: Sequence[dict[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Steps and values, thinned to MOST_POINTS by block means."""
    blocks = min(len(steps), MOST_POINTS)
    step_S, value_S = (np.array([step.get(name, np.nan) for step in steps], dtype=float) for name in ("step", key))
    return _block_means(step_S, blocks), _block_means(value_S, blocks)


def _block_means(values: Floats, blocks: int) -> Floats:
    return np.array([block.mean() for block in np.array_split(values, blocks)])


def _smoothed(value_S: Floats) -> Floats:
    """Centred mean over a twentieth of the run; at the ends over what there is."""
    half = max(len(value_S) // 40, 1)
    return np.array([value_S[max(i - half, 0) : i + half + 1].mean() for i in range(len(value_S))])
