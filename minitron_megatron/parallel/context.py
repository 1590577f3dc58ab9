"""Context parallelism: a sequence shared out over ranks, and keys and values gathered from all of them.

The sequence is cut into two chunks for each of R ranks, and rank r has chunks r and 2R − 1 − r: under a causal mask the work of every rank
is the same. Transformer Engine's ring attention and megatron's rotary embedding deal it out so.

Legend: S sequence, s = S / R this rank's part of it, R context ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.parallel.collectives import gather_first


def chunks_of_rank(rank: int, ranks: int) -> tuple[int, int]:
    """Which two of the 2 · ranks chunks a rank has, in order."""
    return rank, 2 * ranks - 1 - rank


def part_of_rank(x: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A rank's chunks of a dimension, which 2 · ranks divides; x itself over one rank."""
    if ranks == 1:
        return x
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat([chunks[number] for number in chunks_of_rank(rank, ranks)], dim)


def in_order(parts_Rs: Tensor) -> Tensor:
    """[R, s, …] the parts of all ranks → [S, …] as the tokens follow each other."""
    ranks = len(parts_Rs)
    chunks = parts_Rs.unflatten(1, (2, -1))
    return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1) if ranks > 1 else parts_Rs[0]


def by_rank(x_S: Tensor, ranks: int) -> Tensor:
    """[S, …] → [R, s, …]: what in_order takes back."""
    return torch.stack([part_of_rank(x_S, 0, rank, ranks) for rank in range(ranks)])


class GatheredSequence(torch.autograd.Function):
    """[s, …] of this rank → [S, …] of all, in order; backward adds up all ranks' gradients of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x_s: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return in_order(gather_first(x_s, group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts_Rs = by_rank(gradients[0], ctx.group.size())
        own = torch.empty_like(parts_Rs[0])
        dist.reduce_scatter_tensor(own, parts_Rs.flatten(0, 1), group=ctx.group)
        return own, None


def gather_sequence(x_s: Tensor, group: dist.ProcessGroup) -> Tensor:
    """See GatheredSequence."""
    gathered: Tensor = GatheredSequence.apply(x_s, group)
    return gathered
