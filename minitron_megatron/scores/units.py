"""Scores of units: what pruning ranks. Higher is kept.

Legend: L layers, D hidden, F ffn, H query heads, K head channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import TensorRow, unpack
from minitron_megatron.scores.statistics import INFLUENCE, Statistics, over_samples


@dataclass(frozen=True)
class UnitScores:
    """One score per unit of each axis, fp64, unitless."""

    ffn: list[Tensor]
    """L × [F]"""
    heads: list[Tensor]
    """L × [H]"""
    channels: Tensor
    """[D]"""
    layers: Tensor
    """[L]"""


def activation_scores(statistics: Statistics, *, batch: str, sequence: str) -> UnitScores:
    """Scores from activations (P1 section 2.2): FFN neurons and heads per layer, channels summed over all norms, layers by BI."""
    arch, samples = statistics.arch, statistics.samples

    def score(layer: int, axis: str) -> Tensor:
        return over_samples(statistics.sums[layer, axis], samples, sequence=sequence, batch=batch)

    layers = range(arch.layers)
    return UnitScores(
        ffn=[score(layer, "ffn") for layer in layers],
        heads=[head_scores(score(layer, "heads"), arch) for layer in layers],
        channels=torch.stack([score(layer, axis) for layer in layers for axis in ("attention_norm", "mlp_norm")]).sum(0),
        layers=block_influence(statistics),
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
        ffn=[draw(arch.ffn) for _ in range(arch.layers)],
        heads=[draw(arch.heads) for _ in range(arch.layers)],
        channels=draw(arch.hidden),
        layers=draw(arch.layers),
    )


def magnitude_scores(tensors: Iterable[tuple[TensorRow, Tensor]], arch: Architecture) -> UnitScores:
    """The baseline of weight magnitude: L2 norm over all weights that go with a unit."""
    ffn, heads = torch.zeros(arch.layers, arch.ffn), torch.zeros(arch.layers, arch.heads)
    channels, layers = torch.zeros(arch.hidden), torch.zeros(arch.layers)
    for row, tensor in tensors:
        squares = tensor.float().square()
        for dim in (dim for dim, axis in enumerate(row.axes) if axis == "D"):
            channels += _sum_but(squares, dim)
        if row.layer is None:
            continue
        layers[row.layer] += squares.sum()
        if row.axes[0] == "2F":
            ffn[row.layer] += _sum_but(squares, 0).view(2, arch.ffn).sum(0)
        elif row.axes[-1] == "F":
            ffn[row.layer] += _sum_but(squares, squares.dim() - 1)
        elif row.axes[0] == "QKV":
            queries = unpack(row, squares, arch)[0]
            heads[row.layer] += _sum_but(queries, 0).view(arch.heads, -1).sum(-1)
        elif row.axes[-1] == "HK":
            heads[row.layer] += _sum_but(squares, squares.dim() - 1).view(arch.heads, -1).sum(-1)
    roots = [value.double().sqrt() for value in (ffn, heads, channels, layers)]
    return UnitScores(ffn=list(roots[0]), heads=list(roots[1]), channels=roots[2], layers=roots[3])


def _sum_but(x: Tensor, dim: int) -> Tensor:
    """Sum over every dimension but one."""
    others = [other for other in range(x.dim()) if other != dim]
    return x.sum(others) if others else x
