"""Scores of units: what pruning ranks. Higher is kept.

Legend: L layers, D hidden, F ffn, H query heads, K head channels, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import TensorRow, unpack
from minitron_megatron.scores.statistics import INFLUENCE, Statistics, over_samples


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


def activation_scores(statistics: Statistics, *, batch: str, sequence: str) -> UnitScores:
    """Scores from activations (P1 section 2.2): FFN neurons, experts and heads per layer, channels summed over all norms, layers by BI."""
    arch, samples = statistics.arch, statistics.samples

    def score(layer: int, axis: str) -> Tensor:
        return over_samples(statistics.sums[layer, axis], samples, sequence=sequence, batch=batch)

    layers = range(arch.layers)
    sparse = layers if arch.experts else range(0)
    return UnitScores(
        ffn=[score(layer, "ffn") for layer in layers if not arch.experts],
        heads=[head_scores(score(layer, "heads"), arch) for layer in layers],
        channels=torch.stack([score(layer, axis) for layer in layers for axis in ("attention_norm", "mlp_norm")]).sum(0),
        layers=block_influence(statistics),
        experts=[score(layer, "experts") for layer in sparse],
        expert_ffn=[score(layer, "expert_ffn").view(arch.experts, arch.ffn) for layer in sparse],
    )


def head_scores(channel_scores: Tensor, arch: Architecture) -> Tensor:
    """[H·K] scores of the heads' output channels → [H], the L2 norm over each head's K channels."""
    return channel_scores.view(arch.heads, arch.head_channels).norm(dim=-1)


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
        ffn=[draw(arch.ffn) for _ in range(arch.layers) if not arch.experts],
        heads=[draw(arch.heads) for _ in range(arch.layers)],
        channels=draw(arch.hidden),
        layers=draw(arch.layers),
        experts=[draw(arch.experts) for _ in range(arch.layers) if arch.experts],
        expert_ffn=[draw(arch.experts * arch.ffn).view(arch.experts, arch.ffn) for _ in range(arch.layers) if arch.experts],
    )


def magnitude_scores(tensors: Iterable[tuple[TensorRow, Tensor]], arch: Architecture) -> UnitScores:
    """The baseline of weight magnitude: L2 norm over all weights that go with a unit; with an expert goes its row of the router."""
    ffn, heads = torch.zeros(arch.layers, max(arch.experts, 1), arch.ffn), torch.zeros(arch.layers, arch.heads)
    experts = torch.zeros(arch.layers, arch.experts)
    channels, layers = torch.zeros(arch.hidden), torch.zeros(arch.layers)
    for row, tensor in tensors:
        squares = tensor.float().square()
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
            ffn[row.layer, row.expert or 0] += _sum_but(squares, 0).view(2, arch.ffn).sum(0)
        elif "F" in row.axes:
            ffn[row.layer, row.expert or 0] += _sum_but(squares, row.axes.index("F"))
        elif row.axes[0] == "QKV":
            queries = unpack(row, squares, arch)[0]
            heads[row.layer] += _sum_but(queries, 0).view(arch.heads, -1).sum(-1)
        elif row.axes[-1] == "HK":
            heads[row.layer] += _sum_but(squares, squares.dim() - 1).view(arch.heads, -1).sum(-1)
    ffn, heads, channels, layers, experts = (value.double().sqrt() for value in (ffn, heads, channels, layers, experts))
    if arch.experts:
        return UnitScores([], list(heads), channels, layers, experts=list(experts), expert_ffn=list(ffn))
    return UnitScores(list(ffn[:, 0]), list(heads), channels, layers)


def _sum_but(x: Tensor, dim: int) -> Tensor:
    """Sum over every dimension but one."""
    others = [other for other in range(x.dim()) if other != dim]
    return x.sum(others) if others else x
