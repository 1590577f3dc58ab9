"""From the ranks' sums to one set of statistics: sums first, over every group; roots are for whoever reads the file (P1 section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.importance.accumulate import BlockSums
from minitron_megatron.importance.hooks import MicroBatchSums
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.statistics import INFLUENCE, Key

SEQUENCE_SHARDED = ("attention_norm", "mlp_norm")
"""Axes whose hooks see a part of the sequence under sequence parallelism; the others see all of it and a part of the units."""


def complete_over_sequence(found: MicroBatchSums, layout: Layout) -> None:
    """Adds the sums of the other parts of the sequence: a sample must be whole before anything non-linear."""
    if not layout.sequence_parallel:
        return
    sharded = [value for (_, axis), value in found.token_sums.items() if axis in SEQUENCE_SHARDED] + list(found.cosine_sums.values())
    flat = sum_over(torch.cat([value.flatten() for value in sharded]), layout.groups.tp)
    for value, total in zip(sharded, flat.split([value.numel() for value in sharded]), strict=True):
        value.copy_(total.view_as(value))


def gather_blocks(sums: BlockSums, layout: Layout, world: World) -> dict[int, dict[Key, Tensor]]:
    """Block → every layer's sums with all units, on the main process; nothing elsewhere. Each block comes from the ranks that own it."""
    mine = layout.tensor_rank, {block: {key: value.cpu() for key, value in values.items()} for block, values in sums.blocks.items()}
    if world.size == 1:
        return _join([mine])
    gathered: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(mine, gathered, dst=0)
    return _join(gathered or [])


def fold(totals: dict[Key, Tensor], blocks: dict[int, dict[Key, Tensor]]) -> dict[Key, Tensor]:
    """The totals with blocks added in their order, the only one: every layout and every interrupted pass gives the same bits."""
    folded = dict(totals)
    for block in sorted(blocks):
        for key, value in blocks[block].items():
            folded[key] = folded[key] + value if key in folded else value
    return folded


def _join(parts: list[tuple[int, dict[int, dict[Key, Tensor]]]]) -> dict[int, dict[Key, Tensor]]:
    """Units of the tensor ranks side by side; axes that every tensor rank sees whole are taken once."""
    pieces: dict[int, dict[Key, list[Tensor]]] = {}
    for tensor_rank, blocks in sorted(parts, key=lambda part: part[0]):
        for block, sums in blocks.items():
            for key, value in sums.items():
                if tensor_rank == 0 or key[1] not in (*SEQUENCE_SHARDED, INFLUENCE):
                    pieces.setdefault(block, {}).setdefault(key, []).append(value)
    return {block: {key: torch.cat(values, dim=-1) for key, values in sums.items()} for block, sums in pieces.items()}
