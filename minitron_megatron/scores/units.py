"""Scores of units: what pruning ranks. Higher is kept.

Legend: L layers, D hidden, F ffn, H query heads, G key/value groups, K head channels, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import TensorRow, unpack
from minitron_megatron.config.criteria import DEFAULT_RANKING, AggregatedAxis, Ranking
from minitron_megatron.errors import ArtifactError
from minitron_megatron.scores.statistics import FINAL_NORM, INFLUENCE, Statistics, over_samples


@dataclass(frozen=True)
class UnitScores:
    """One score per unit of each axis, fp64, unitless."""

    ffn: list[Tensor]
    """L × [F]; none where layers have experts"""
    heads: list[Tensor]
    """L × [H]"""
    channels: Tensor
    """[D]"""
    layers: Tensor
    """[L]"""
    experts: list[Tensor] = field(default_factory=list)
    """L × [E]; none in a dense model"""
    expert_ffn: list[Tensor] = field(default_factory=list)
    """L × [E, F], ranked within each expert"""
    kv_groups: list[Tensor] = field(default_factory=list)
    """L × [G], a whole group: its key, its value and all its query heads"""


def activation_scores(statistics: Statistics, ranking: Ranking = DEFAULT_RANKING) -> UnitScores:
    """Scores from activations (P1 section 2.2), by whatever ranking out of one file; layers by BI.

    Raises ArtifactError for a file in which a criterion was not measured.
    """
    arch, criteria = statistics.arch, ranking.criteria

    def score(layer: int, seen: str, axis: AggregatedAxis) -> Tensor:
        by = ranking.of(axis)
        return over_samples(_measured(statistics, layer, seen), statistics.samples, sequence=by.sequence, batch=by.batch)

    layers = range(arch.layers)
    sparse = layers if arch.experts else range(0)
    norms = [(layer, norm) for layer in layers for norm in ("attention_norm", "mlp_norm")]
    norms += [(arch.layers - 1, FINAL_NORM)] if criteria.channels == "all_norms" else []
    neurons = "ffn" if criteria.ffn == "input_of_second" else "ffn_before_activation"
    if criteria.heads == "per_channel":
        heads = [head_scores(score(layer, "heads", "heads"), arch) for layer in layers]
    else:
        norms_of_heads = "head_norms" if criteria.heads == "per_token_norm" else "head_contributions"
        heads = [score(layer, norms_of_heads, "heads") for layer in layers]
    return UnitScores(
        ffn=[score(layer, neurons, "ffn") for layer in layers if not arch.experts],
        heads=heads,
        channels=torch.stack([score(layer, norm, "channels") for layer, norm in norms]).sum(0),
        layers=block_influence(statistics),
        experts=[score(layer, "experts", "experts") for layer in sparse],
        expert_ffn=[score(layer, "expert_ffn", "ffn").view(arch.experts, arch.ffn) for layer in sparse],
        kv_groups=[group_scores(scores_H, arch) for scores_H in heads],
    )


def _measured(statistics: Statistics, layer: int, seen: str) -> Tensor:
    if (layer, seen) not in statistics.sums:
        raise ArtifactError(
            f"the scores file is of an older version, or of importance.sums=default, and lacks {seen} of layer {layer} of this model; "
            "make it anew with: minitron importance RECIPE importance.sums=all"
        )
    return statistics.sums[layer, seen]


def head_scores(channel_scores: Tensor, arch: Architecture) -> Tensor:
    """[H·K] scores of the heads' output channels → [H], the L2 norm over each head's K channels."""
    return channel_scores.view(arch.heads, arch.head_channels).norm(dim=-1)


def group_scores(scores_H: Tensor, arch: Architecture) -> Tensor:
    """[H] scores of heads → [G], the L2 norm over each group's heads: as a head's score over its channels, so a group's is one over all of its."""
    return scores_H.view(arch.kv_groups, arch.heads_per_group).norm(dim=-1)


def block_influence(statistics: Statistics) -> Tensor:
    """[L] 1 − mean over samples and tokens of cos(layer input, layer output); low: the layer changes little (P2 section 2.2)."""
    totals = [statistics.sums[layer, INFLUENCE][0] for layer in range(statistics.arch.layers)]
    return 1 - torch.stack(totals) / statistics.samples


def random_scores(arch: Architecture, seed: int) -> UnitScores:
    """The baseline that knows nothing; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(units: int) -> Tensor:
        return torch.rand(units, generator=generator, dtype=torch.float64)

    return UnitScores(
        ffn=[draw(width) for width in arch.ffn_widths if not arch.experts],
        heads=[draw(arch.heads) for _ in range(arch.layers)],
        channels=draw(arch.hidden),
        layers=draw(arch.layers),
        experts=[draw(arch.experts) for _ in range(arch.layers) if arch.experts],
        expert_ffn=[draw(arch.experts * arch.ffn).view(arch.experts, arch.ffn) for _ in range(arch.layers) if arch.experts],
        kv_groups=[draw(arch.kv_groups) for _ in range(arch.layers)],  # last: a seed's other draws are what they were
    )


def magnitude_scores(tensors: Iterable[tuple[TensorRow, Tensor]], arch: Architecture) -> UnitScores:
    """The baseline of weight magnitude: L2 norm over all weights that go with a unit.

    With an expert goes its row of the router, with a key/value group its key, its value and its query heads. A norm's weight that is kept as
    its distance from 1 counts as what it multiplies by.
    """
    ffn, heads = [torch.zeros(max(arch.experts, 1), width) for width in arch.ffn_widths], torch.zeros(arch.layers, arch.heads)
    experts, keys_values = torch.zeros(arch.layers, arch.experts), torch.zeros(arch.layers, arch.kv_groups)
    channels, layers = torch.zeros(arch.hidden), torch.zeros(arch.layers)
    for row, tensor in tensors:
        squares = (tensor.float() + _kept_distance(row, arch)).square()
        for dim in (dim for dim, axis in enumerate(row.axes) if axis == "D"):
            channels += _sum_but(squares, dim)
        if row.layer is None:
            continue
        layers[row.layer] += squares.sum()
        if row.axes[0] == "E":
            experts[row.layer] += _sum_but(squares, 0)
        elif row.expert is not None:
            experts[row.layer, row.expert] += squares.sum()
        if row.axes[0] == "2F":
            ffn[row.layer][row.expert or 0] += _sum_but(squares, 0).view(2, -1).sum(0)
        elif "F" in row.axes:  # the first matrix of an FFN without a gate, too
            ffn[row.layer][row.expert or 0] += _sum_but(squares, row.axes.index("F"))
        elif row.axes[0] == "QKV":
            queries, *others = unpack(row, squares, arch)
            heads[row.layer] += _sum_but(queries, 0).view(arch.heads, -1).sum(-1)
            keys_values[row.layer] += torch.stack([_sum_but(part, 0).view(arch.kv_groups, -1).sum(-1) for part in others]).sum(0)
        elif row.axes[-1] == "HK":
            heads[row.layer] += _sum_but(squares, squares.dim() - 1).view(arch.heads, -1).sum(-1)
    groups = keys_values + heads.view(arch.layers, arch.kv_groups, -1).sum(-1)
    heads, groups, channels, layers, experts = (value.double().sqrt() for value in (heads, groups, channels, layers, experts))
    neurons = [value.double().sqrt() for value in ffn]
    if arch.experts:
        return UnitScores([], list(heads), channels, layers, experts=list(experts), expert_ffn=neurons, kv_groups=list(groups))
    return UnitScores([value[0] for value in neurons], list(heads), channels, layers, kv_groups=list(groups))


def _kept_distance(row: TensorRow, arch: Architecture) -> int:
    """What is added to a tensor before it multiplies anything: 1 to the weights of LayerNorm1p."""
    return int(arch.family.norm == "layernorm1p" and row.hf_names[0].endswith("norm.weight"))


def _sum_but(x: Tensor, dim: int) -> Tensor:
    """Sum over every dimension but one."""
    others = [other for other in range(x.dim()) if other != dim]
    return x.sum(others) if others else x
