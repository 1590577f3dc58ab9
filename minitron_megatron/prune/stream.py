"""A plan applied to a checkpoint as a stream: one slab of a tensor in memory at a time, no model is built, any number of processes share the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, checkpoint_bytes, write_torch_dist
from minitron_megatron.prune.plan import PrunePlan
from minitron_megatron.prune.slice import slice_rows, slice_tensor


def apply_plan(
    source: MegatronSource,
    plan: PrunePlan,
    folder: Path,
    group: dist.ProcessGroup | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str:
    """Writes the pruned checkpoint, shared with the other processes of the group; returns the digest of its weights.

    on_bytes: told of what this process has written.
    """
    origin = source_rows(plan)

    def read(row: TensorRow, rows: range | None = None) -> Tensor:
        old = origin[row.name]
        if rows is None:
            return slice_tensor(old, source.read(old), plan)
        return slice_rows(old, rows, lambda kept: source.read(old, kept), plan)

    return write_torch_dist(
        folder,
        tensor_table(plan.target),
        plan.target,
        dtype=lambda row: source.dtype(origin[row.name]),
        read=read,
        group=group,
        on_bytes=on_bytes,
    )


def pruned_bytes(source: MegatronSource, plan: PrunePlan) -> int:
    origin = source_rows(plan)
    return checkpoint_bytes(tensor_table(plan.target), plan.target, lambda row: source.dtype(origin[row.name]))


def source_rows(plan: PrunePlan) -> dict[str, TensorRow]:
    """Name of a target tensor → the source's row it is cut from."""
    by_place = {(row.layer, row.expert, _kind(row)): row for row in tensor_table(plan.source)}
    return {row.name: by_place[(*_source_place(row, plan), _kind(row))] for row in tensor_table(plan.target)}


def _source_place(row: TensorRow, plan: PrunePlan) -> tuple[int | None, int | None]:
    """Layer and expert of the source that a target's row comes from."""
    if row.layer is None:
        return None, None
    layer = plan.kept_layers[row.layer]
    return layer, None if row.expert is None else plan.experts[layer][row.expert]


def _kind(row: TensorRow) -> str:
    """The name without the numbers of its layer and expert."""
    return row.key.replace(f".layers.{row.layer}.", ".layers.")
