"""From the ranks' sums to one set of statistics: sums first, over every group; roots are for whoever reads the file."""

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
from minitron_megatron.scores.statistics import INFLUENCE

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


def reduce_statistics(blocks: BlockSums, layout: Layout, world: World) -> dict[tuple[int, str], Tensor] | None:
    """Every layer's sums over all samples, with all units; on the main process, None elsewhere."""
    totals = {key: _over_blocks(value, layout) for key, value in _every_key(blocks, layout, world).items()}
    part = {"tensor_rank": layout.tensor_rank, "totals": {key: value.cpu() for key, value in totals.items()}}
    mine: Any = part if layout.data_rank == 0 else None
    if world.size == 1:
        return _join([mine])
    gathered: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(mine, gathered, dst=0)
    return _join([part for part in gathered if part]) if gathered else None


def _every_key(blocks: BlockSums, layout: Layout, world: World) -> dict[tuple[int, str], Tensor]:
    """A data-parallel rank without samples takes part with zeros; the first one, which always has some, tells the shapes."""
    if layout.data == 1:
        return blocks.sums
    shapes = [{key: value.shape for key, value in blocks.sums.items()}]
    dist.broadcast_object_list(shapes, group=layout.groups.dp, group_src=0)
    zeros = {key: torch.zeros(shape, dtype=torch.float64, device=world.platform.device) for key, shape in shapes[0].items()}
    return {**zeros, **blocks.sums}


def _over_blocks(blocks: Tensor, layout: Layout) -> Tensor:
    """A block is zero on every data-parallel rank but its owner's, so the reduction is exact; then blocks in order."""
    complete = sum_over(blocks, layout.groups.dp)
    total = torch.zeros_like(complete[0])
    for block in complete:
        total += block
    return total


def _join(parts: list[dict[str, Any]]) -> dict[tuple[int, str], Tensor]:
    """Units of the tensor ranks side by side; axes that every tensor rank sees whole are taken once."""
    joined: dict[tuple[int, str], list[Tensor]] = {}
    for part in sorted(parts, key=lambda part: part["tensor_rank"]):
        for (layer, axis), value in part["totals"].items():
            if axis in (*SEQUENCE_SHARDED, INFLUENCE) and part["tensor_rank"] > 0:
                continue
            joined.setdefault((layer, axis), []).append(value)
    return {key: torch.cat(values, dim=-1) if len(values) > 1 else values[0] for key, values in sorted(joined.items())}
