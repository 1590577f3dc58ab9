"""The figures of each section, or the sentence that says why one is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.report import figures
from minitron_megatron.report.depth_figure import depth_figure
from minitron_megatron.report.run_data import RunData
from minitron_megatron.results.pareto import pareto_svg


@dataclass(frozen=True)
class Figure:
    """An inline SVG with its caption, or the sentence that says why it is not there."""

    title: str
    caption: str
    svg: Markup | None = None
    missing: str = ""


def training_figures(run: RunData) -> list[Figure]:
    """KL and perplexity over the steps of the distillation."""
    missing = "" if run.steps else "The training curves are left out: the stage distill has no metrics."
    validated = any(step.get("validation") for step in run.steps)
    unvalidated = "" if validated else "Perplexity is left out: the stage distill has made no validation."
    kl = "Forward KL of each step and on validation samples; below, the learning rate."
    perplexity = "On validation samples; below, the gradient norm of each step."
    return [
        _figure("KL to the teacher", kl, lambda: figures.kl_curve(run.steps), missing),
        _figure("Perplexity", perplexity, lambda: figures.perplexity_curve(run.steps), missing or unvalidated),
    ]


def importance_figures(run: RunData) -> list[Figure]:
    """Heat maps of what is ranked within a layer, and the Block Influence of the layers."""
    missing = "" if run.importance else "The importance figures are left out: the stage importance has no summary."
    heads_cut = run.shapes is not None and run.shapes[0].heads != run.shapes[1].heads
    sparse = run.shapes is not None and run.shapes[0].experts > 0
    units = {**({"experts": "expert"} if sparse else {"ffn": "FFN neuron"}), **({"heads": "query head"} if heads_cut else {})}
    influence = (run.importance or {}).get("block_influence", [])
    return [
        *(_heatmap(run, kind, unit, missing) for kind, unit in units.items()),
        _figure(
            "Block Influence",
            "1 − cosine of what enters and leaves a layer; low means that the layer changes little.",
            lambda: figures.block_influence_bars(influence, run.dropped_layers),
            missing or ("" if len(influence) else "Left out: the stage importance gives no Block Influence."),
        ),
        *([_depth(run.depth)] if run.depth else []),
    ]


def search_figure(run: RunData) -> Figure | None:
    """The trained candidates, where there was a search."""
    if run.ranking is None:
        return None
    caption = (
        "Loss of each candidate after the first and the last round, ± 2 standard errors. Most of an error bar is what the windows have in common: "
        "the differences in the table are paired."
    )
    return _figure("Candidates", caption, lambda: pareto_svg(run.ranking or {}), "")


def cut_figure(run: RunData) -> Figure:
    """What is kept of each layer."""

    def draw() -> str:
        source = Architecture.from_dict((run.plan or {})["source"])
        ffn = figures.Kept("FFN neurons", source.ffn, run.kept_of("ffn"))
        heads = figures.Kept("query heads", source.heads, run.kept_of("heads"))
        experts = [figures.Kept("experts", source.experts, run.kept_of("experts"))] if source.experts else []
        return figures.kept_strips([*experts, ffn, heads])

    missing = "" if run.plan else "What was cut is left out: the stage prune has no plan."
    return _figure("Layer by layer", "The share of each layer that is kept.", draw, missing)


def _depth(depth: dict[str, Any]) -> Figure:
    kinds = {
        "block": "One block of layers is left out at a time.",
        "ranked": "Each layer is left out alone.",
        "greedy": "Each layer is left out alone; those that went are numbered in their order, each chosen without the ones before it.",
    }
    noise = " The choice is within noise: other candidates could as well have gone." if depth["is_noise"] else ""
    return _figure("Layers left out", f"{kinds[depth['removal']]} Bars: standard error.{noise}", lambda: depth_figure(depth), "")


def _heatmap(run: RunData, kind: str, unit: str, missing: str) -> Figure:
    scores_LF = [np.asarray(scores_F) for scores_F in (run.importance or {}).get(kind, [])]
    every_L: list[int | None] = [len(scores_F) for scores_F in scores_LF]
    kept_L: Sequence[int | None] = run.kept_of(kind) or every_L
    other = _cut_by_other(run, kind)
    if other:  # a line would say that the units right of it are those that went
        kept_L = [None if kept is None else every for kept, every in zip(kept_L, every_L, strict=True)]
    caption = f"One row per layer, its {unit}s sorted by score and divided by the layer's largest.{_scored_by(run, kind)}{other}"

    def draw() -> str:
        return figures.importance_heatmap(scores_LF, kept_L, unit=unit)

    nothing = "" if scores_LF else f"Left out: the stage importance gives no scores of {unit}s."
    return _figure(f"Importance of each {unit}", caption, draw, missing or nothing)


def _scored_by(run: RunData, kind: str) -> str:
    """What the shown scores are: the file's default, whatever the recipe ranks by."""
    by = (run.importance or {}).get("ranked_by", {}).get(kind)
    return f" Score: {_in_words(by)}." if by else ""


def _cut_by_other(run: RunData, kind: str) -> str:
    """Where pruning did not rank by the shown scores, what by."""
    if isinstance(run.pruned_by, str):
        return f" Pruned by {run.pruned_by} scores, not by these: the cut is not marked."
    used, shown = ((by or {}).get(kind) for by in (run.pruned_by, (run.importance or {}).get("ranked_by")))
    return "" if used is None or used == shown else f" Pruned by {_in_words(used)}, not by these: the cut is not marked."


def _in_words(by: dict[str, str]) -> str:
    return f"{by['criterion']}, {by['batch']} over samples of {by['sequence']} over tokens".replace("_", " ")


def _figure(title: str, caption: str, draw: Callable[[], str], missing: str) -> Figure:
    if missing:
        return Figure(title, caption, missing=missing)
    return Figure(title, caption, svg=Markup(draw()))  # our own SVG; matplotlib escapes its texts
