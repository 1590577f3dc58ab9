"""From the ranks' sums to one set of statistics: sums first, over every group; roots are for whoever reads the file (P1 section 2.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.importance.accumulate import BlockSums
from minitron_megatron.importance.hooks import MicroBatchSums
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.statistics import EXPERT_AXES, FINAL_NORM, Key, is_influence

SEQUENCE_SHARDED = ("attention_norm", "mlp_norm", FINAL_NORM)
"""Axes whose hooks see a part of the sequence under sequence parallelism; the others see all of it and a part of the units."""


class Part(NamedTuple):
    """What one process measured."""

    tensor_rank: int
    expert_rank: int
    blocks: dict[int, dict[Key, Tensor]]


def complete_over_sequence(found: MicroBatchSums, layout: Layout) -> None:
    """Adds the sums of the other parts of the sequence: a sample must be whole before anything non-linear."""
    if not layout.sequence_parallel:
        return
    sharded = [value for (_, axis), value in found.token_sums.items() if axis in SEQUENCE_SHARDED] + list(found.cosine_sums.values())
    flat = sum_over(torch.cat([value.flatten() for value in sharded]), layout.groups.tp)
    for value, total in zip(sharded, flat.split([value.numel() for value in sharded]), strict=True):
        value.copy_(total.view_as(value))


def gather_blocks(sums: BlockSums, layout: Layout, world: World) -> dict[int, dict[Key, Tensor]]:
    """Block → every layer's sums with all units, on the main process; nothing elsewhere.

    Each block comes from the ranks that own it; of experts from all that share theirs with its owner.
    """
    blocks = {block: {key: value.cpu() for key, value in values.items()} for block, values in sums.blocks.items()}
    mine = Part(layout.tensor_rank, layout.expert_rank, blocks)
    if world.size == 1:
        return _join([mine], layout.expert)
    gathered: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(mine, gathered, dst=0)
    return _join(gathered or [], layout.expert)


def fold(totals: dict[Key, Tensor], blocks: dict[int, dict[Key, Tensor]]) -> dict[Key, Tensor]:
    """The totals with blocks added in their order, the only one: every layout and every interrupted pass gives the same bits."""
    folded = dict(totals)
    for block in sorted(blocks):
        for key, value in blocks[block].items():
            folded[key] = folded[key] + value if key in folded else value
    return folded


def _join(parts: list[Part], expert_ranks: int) -> dict[int, dict[Key, Tensor]]:
    """Units of the tensor or expert ranks side by side; axes that every tensor rank sees whole are taken once."""
    pieces: dict[int, dict[Key, dict[int, Tensor]]] = {}
    for part in parts:
        for block, sums in part.blocks.items():
            for key, value in sums.items():
                rank = part.expert_rank if key[1] in EXPERT_AXES else part.tensor_rank
                if rank == 0 or not (key[1] in SEQUENCE_SHARDED or is_influence(key[1])):
                    pieces.setdefault(block, {}).setdefault(key, {})[rank] = value
    return {block: {key: _side_by_side(key, by_rank, expert_ranks) for key, by_rank in keys.items()} for block, keys in pieces.items()}


def _side_by_side(key: Key, by_rank: dict[int, Tensor], expert_ranks: int) -> Tensor:
    if key[1] not in EXPERT_AXES:
        return torch.cat([by_rank[rank] for rank in sorted(by_rank)], dim=-1)
    # a rank to whose experts no token of the block was sent has no sums of it
    none = torch.zeros_like(next(iter(by_rank.values())))
    return torch.cat([by_rank.get(rank, none) for rank in range(expert_ranks)], dim=-1)
