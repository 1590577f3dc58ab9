"""The plan: which units of the source are kept, by global layer number and source index.

Legend: D hidden, F ffn, H query heads, G key/value groups, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.errors import PlanError
from minitron_megatron.prune.rank import budget_margin, residual_partners, top, top_heads, widths_of_budget
from minitron_megatron.scores.margins import margin_at
from minitron_megatron.scores.units import UnitScores


@dataclass(frozen=True)
class PrunePlan:
    """Kept units in ascending order of their source index; ffn, heads, kv_groups and experts by source layer, for kept layers only."""

    source: Architecture
    target: Architecture
    kept_layers: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    """Of kept groups."""
    kv_groups: dict[int, list[int]]
    channels: list[int]
    experts: dict[int, list[int]] = field(default_factory=dict)
    """Empty in a dense model, where ffn holds the neurons."""
    expert_ffn: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    """Source layer → source expert → kept neurons, for kept experts only."""
    margins: dict[str, Any] = field(default_factory=dict)
    """Gap at the cut over the axis's largest score: ffn, heads, kv_groups, experts and expert_ffn (heads: of the closest kept group; expert_ffn:
    of the closest kept expert) by source layer, channels, layers; ffn_widths, of the ranking over all layers that gave the widths, where there
    was one (rank.budget_margin). None: nothing is cut, or the layers were given."""
    head_residual: dict[int, dict[int, int]] = field(default_factory=dict)
    """Source layer → kept head → pruned head whose residual it takes; empty where nothing is added."""
    rounding: list[str] = field(default_factory=list)
    """What alignment made of the recipe's sizes."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict()) + "\n")

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "kept_layers": self.kept_layers,
            "ffn": self.ffn,
            "heads": self.heads,
            "kv_groups": self.kv_groups,
            "channels": self.channels,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
            "margins": self.margins,
            "head_residual": self.head_residual,
            "rounding": self.rounding,
        }

    @property
    def dropped_layers(self) -> list[int]:
        return sorted(set(range(self.source.layers)) - set(self.kept_layers))


def make_plan(
    scores: UnitScores,
    source: Architecture,
    target: Architecture,
    *,
    dropped_layers: list[int] | None = None,
    global_ffn_multiple: int | None = None,
    head_residual: bool = False,
    rounding: list[str] | None = None,
) -> PrunePlan:
    """Keeps the units with the highest scores of each axis (P1 section 2.3); where two are equal, the lower index wins.

    Key/value groups go with all their query heads; heads are ranked within each kept group and the same number is kept in each, so that
    grouped-query attention stays what it is. FFN neurons are ranked within their layer, and within their expert where there are experts.
    dropped_layers: in place of the layers' scores. global_ffn_multiple: neurons are ranked over all layers, and the plan's target has
    widths that are multiples of it and add up to the given target's (rank.widths_of_budget). head_residual: rank.residual_partners.
    Raises PlanError for scores that are not finite or of other sizes than the source.
    """
    _check(scores, source)
    layers = _kept_layers(scores, source, target, dropped_layers)
    margins: dict[str, Any] = {}
    if global_ffn_multiple:
        ranked, neurons = [scores.ffn[layer] for layer in layers], sum(target.ffn_widths)
        margins["ffn_widths"] = budget_margin(ranked, neurons, global_ffn_multiple)
        target = target.resized(ffn=widths_of_budget(ranked, neurons, global_ffn_multiple))
    sparse = layers if source.experts else []
    experts = {layer: top(scores.experts[layer], target.experts) for layer in sparse}
    groups = {layer: top(scores.kv_groups[layer], target.kv_groups) for layer in layers}
    return PrunePlan(
        source=source,
        target=target,
        kept_layers=layers,
        ffn={layer: top(scores.ffn[layer], width) for layer, width in zip(layers, target.ffn_widths, strict=True) if not source.experts},
        heads={layer: top_heads(scores.heads[layer], source.kv_groups, target.heads_per_group, groups[layer]) for layer in layers},
        kv_groups=groups,
        channels=top(scores.channels, target.hidden),
        experts=experts,
        expert_ffn={layer: {expert: top(scores.expert_ffn[layer][expert], target.ffn) for expert in experts[layer]} for layer in sparse},
        margins=margins_of(scores, source, target, groups, experts, layers_given=dropped_layers is not None) | margins,
        head_residual=_residuals(scores, source, target, groups) if head_residual else {},
        rounding=rounding or [],
    )


def margins_of(
    scores: UnitScores,
    source: Architecture,
    target: Architecture,
    groups: dict[int, list[int]],
    experts: dict[int, list[int]],
    *,
    layers_given: bool = False,
) -> dict[str, Any]:
    """How clear the plan's cuts are: a unit whose score is known only to this margin could as well have been kept or cut.

    groups: kept ones by kept layer. experts: kept ones by layer, none in a dense model.
    """
    grouped = {layer: scores.heads[layer].view(source.kv_groups, -1)[kept] for layer, kept in groups.items()}
    if experts:
        neurons = {
            "experts": {layer: margin_at(scores.experts[layer], target.experts) for layer in experts},
            "expert_ffn": {layer: margin_at(scores.expert_ffn[layer][kept], target.ffn) for layer, kept in experts.items()},
        }
    else:
        neurons = {"ffn": {layer: margin_at(scores.ffn[layer], width) for layer, width in zip(groups, target.ffn_widths, strict=True)}}
    return {
        **neurons,
        "heads": {layer: margin_at(heads_GP, target.heads_per_group) for layer, heads_GP in grouped.items()},
        "kv_groups": {layer: margin_at(scores.kv_groups[layer], target.kv_groups) for layer in groups},
        "channels": margin_at(scores.channels, target.hidden),
        "layers": None if layers_given else margin_at(scores.layers, target.layers),
    }


def _kept_layers(scores: UnitScores, source: Architecture, target: Architecture, dropped: list[int] | None) -> list[int]:
    if dropped is None:
        return top(scores.layers, target.layers)
    kept = sorted(set(range(source.layers)) - set(dropped))
    if len(kept) != target.layers:
        raise PlanError(
            f"the layers to drop, {dropped}, leave {len(kept)} of the source's {source.layers} layers, but the target has {target.layers}"
        )
    return kept


def _residuals(scores: UnitScores, source: Architecture, target: Architecture, groups: dict[int, list[int]]) -> dict[int, dict[int, int]]:
    return {layer: residual_partners(scores.heads[layer], source.kv_groups, target.heads_per_group, kept) for layer, kept in groups.items()}


def _check(scores: UnitScores, source: Architecture) -> None:
    every = range(source.layers)
    expected: dict[str, tuple[list[Tensor], list[tuple[int, ...]]]] = {
        "heads": (scores.heads, [(source.heads,) for _ in every]),
        "kv_groups": (scores.kv_groups, [(source.kv_groups,) for _ in every]),
    }
    if source.experts:
        expected["experts"] = (scores.experts, [(source.experts,) for _ in every])
        expected["expert_ffn"] = (scores.expert_ffn, [(source.experts, source.ffn) for _ in every])
    else:
        expected["ffn"] = (scores.ffn, [(width,) for width in source.ffn_widths])
    for name, (rows, units) in expected.items():
        if [tuple(row.shape) for row in rows] != units:
            shown = " × ".join(map(str, max(units)))
            raise PlanError(f"scores: {name} are of another model than the source ({source.layers} layers of {shown}); measure them anew")
    if len(scores.channels) != source.hidden or len(scores.layers) != source.layers:
        raise PlanError(f"scores: channels or layers are of another model than the source ({source.hidden} channels); measure them anew")
    for name, values in (
        *((name, torch.cat([row.flatten() for row in rows])) for name, (rows, _) in expected.items()),
        ("channels", scores.channels),
        ("layers", scores.layers),
    ):
        if not torch.isfinite(values).all():
            raise PlanError(f"scores: {name} are not all finite; the model or the calibration data is broken, measure them anew")
