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
from minitron_megatron.scores.margins import margin_at
from minitron_megatron.scores.units import UnitScores


@dataclass(frozen=True)
class PrunePlan:
    """Kept units in ascending order of their source index; ffn, heads and experts by source layer, for kept layers only."""

    source: Architecture
    target: Architecture
    kept_layers: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    channels: list[int]
    experts: dict[int, list[int]] = field(default_factory=dict)
    """Empty in a dense model, where ffn holds the neurons."""
    expert_ffn: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    """Source layer → source expert → kept neurons, for kept experts only."""
    margins: dict[str, Any] = field(default_factory=dict)
    """Gap at the cut over the axis's largest score: ffn, heads, experts and expert_ffn (heads: of the closest group; expert_ffn: of the closest
    kept expert) by source layer, channels, layers; None: nothing is cut, or the layers were given."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict()) + "\n")

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "kept_layers": self.kept_layers,
            "ffn": self.ffn,
            "heads": self.heads,
            "channels": self.channels,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
            "margins": self.margins,
        }

    @property
    def dropped_layers(self) -> list[int]:
        return sorted(set(range(self.source.layers)) - set(self.kept_layers))


def make_plan(scores: UnitScores, source: Architecture, target: Architecture, *, dropped_layers: list[int] | None = None) -> PrunePlan:
    """Keeps the units with the highest scores of each axis (P1 section 2.3); where two are equal, the lower index wins.

    Heads are ranked within each key/value group and the same number is kept in each, so that grouped-query attention stays what it is.
    FFN neurons are ranked within their expert where there are experts. dropped_layers: in place of the layers' scores.
    Raises PlanError for scores that are not finite or of other sizes than the source.
    """
    _check(scores, source)
    layers = _kept_layers(scores, source, target, dropped_layers)
    sparse = layers if source.experts else []
    experts = {layer: top(scores.experts[layer], target.experts) for layer in sparse}
    return PrunePlan(
        source=source,
        target=target,
        kept_layers=layers,
        ffn={layer: top(scores.ffn[layer], target.ffn) for layer in layers if not source.experts},
        heads={layer: top_heads(scores.heads[layer], source.kv_groups, target.heads_per_group) for layer in layers},
        channels=top(scores.channels, target.hidden),
        experts=experts,
        expert_ffn={layer: {expert: top(scores.expert_ffn[layer][expert], target.ffn) for expert in experts[layer]} for layer in sparse},
        margins=margins_of(scores, layers, experts, target) | ({} if dropped_layers is None else {"layers": None}),
    )


def margins_of(scores: UnitScores, layers: list[int], experts: dict[int, list[int]], target: Architecture) -> dict[str, Any]:
    """How clear the plan's cuts are: a unit whose score is known only to this margin could as well have been kept or cut.

    experts: kept ones by layer, none in a dense model.
    """
    grouped = {layer: scores.heads[layer].view(target.kv_groups, -1) for layer in layers}
    if experts:
        neurons = {
            "experts": {layer: margin_at(scores.experts[layer], target.experts) for layer in experts},
            "expert_ffn": {layer: margin_at(scores.expert_ffn[layer][kept], target.ffn) for layer, kept in experts.items()},
        }
    else:
        neurons = {"ffn": {layer: margin_at(scores.ffn[layer], target.ffn) for layer in layers}}
    return {
        **neurons,
        "heads": {layer: margin_at(heads_GP, target.heads_per_group) for layer, heads_GP in grouped.items()},
        "channels": margin_at(scores.channels, target.hidden),
        "layers": margin_at(scores.layers, target.layers),
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


def top(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, ascending; a stable sort makes the lower index win a tie."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


def top_heads(scores_H: Tensor, groups: int, kept_per_group: int) -> list[int]:
    """Indices of the highest-scored heads of every group, ascending."""
    per_group = scores_H.view(groups, -1)
    size = per_group.shape[1]
    return [group * size + head for group in range(groups) for head in top(per_group[group], kept_per_group)]


def _check(scores: UnitScores, source: Architecture) -> None:
    neurons = {"experts": (scores.experts, (source.experts,)), "expert_ffn": (scores.expert_ffn, (source.experts, source.ffn))}
    expected = {**(neurons if source.experts else {"ffn": (scores.ffn, (source.ffn,))}), "heads": (scores.heads, (source.heads,))}
    for name, (rows, units) in expected.items():
        if len(rows) != source.layers or any(tuple(row.shape) != units for row in rows):
            shown = " × ".join(map(str, units))
            raise PlanError(f"scores: {name} are of another model than the source ({source.layers} layers of {shown}); measure them anew")
    if len(scores.channels) != source.hidden or len(scores.layers) != source.layers:
        raise PlanError(f"scores: channels or layers are of another model than the source ({source.hidden} channels); measure them anew")
    for name, values in (
        *((name, torch.cat(rows)) for name, (rows, _) in expected.items()),
        ("channels", scores.channels),
        ("layers", scores.layers),
    ):
        if not torch.isfinite(values).all():
            raise PlanError(f"scores: {name} are not all finite; the model or the calibration data is broken, measure them anew")
