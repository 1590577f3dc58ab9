"""Matplotlib figures as inline SVG with the colours and the font of the page: one figure serves light and dark."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH_INCHES = 5.3
# Each colour is a mark that becomes a variable of the page's style sheet; the hues there are Okabe and Ito's, which
# colour-blind eyes tell apart.
COLOURS = {
    "ink": "#000101",
    "muted": "#000202",
    "grid": "#000303",
    "kept": "#000404",
    "cut": "#000505",
    "accent": "#000606",
    "soft": "#000707",
    "card": "#000808",
}
INK, MUTED, GRID, KEPT, CUT, ACCENT, SOFT, CARD = COLOURS.values()
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, small, searchable
    "svg.hashsalt": "minitron",  # the same figure is the same text on every run
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "legend.handlelength": 1.4,
}


def to_svg(figure: Figure, description: str) -> str:
    """An <svg> element that scales to its container; description is read out by screen readers.

    Call it inside `style()`, in which the figure was made.
    """
    buffer = io.StringIO()
    metadata = {"Date": None}
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.03, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    # group names such as axes_1 would be there twice on a page with two figures; nothing refers to them
    text = re.sub(r'<g id="[\w.]+_\d+">', "<g>", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    for name, mark in COLOURS.items():
        text = text.replace(mark, f"var(--{name})")
    label = description.replace("&", "and").replace('"', "'").replace("<", "less than ")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def standalone(svg: str) -> str:
    """The same figure as a file of its own, where no page gives it colours."""
    light = "--sans: system-ui, sans-serif; --ink: #16191d; --muted: #59616b; --grid: #dde1e6; --kept: #0072b2; --cut: #d55e00;"
    rest = "--accent: #00805c; --soft: #cfd6dd; --card: #ffffff; background: #ffffff;"
    named = svg.replace("<svg ", f'<svg style="{light} {rest}" ', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{named}\n'


def new_figure(height_inches: float) -> Figure:
    """A figure outside of pyplot's global list."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def style() -> AbstractContextManager[None]:
    """Context in which figures are made: matplotlib's settings are as before after it."""
    return matplotlib.rc_context(STYLE)


def legend_above(axes: Axes, columns: int) -> None:
    """The legend in a row over the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns, labelcolor=MUTED, columnspacing=1.2)
