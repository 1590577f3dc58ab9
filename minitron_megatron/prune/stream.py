"""A plan applied to a checkpoint as a stream: one tensor in memory at a time, no model is built, any number of processes share the work."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, checkpoint_bytes, write_torch_dist
from minitron_megatron.prune.plan import PrunePlan
from minitron_megatron.prune.slice import slice_tensor


def apply_plan(source: MegatronSource, plan: PrunePlan, folder: Path, group: dist.ProcessGroup | None = None) -> str:
    """Writes the pruned checkpoint, shared with the other processes of the group; returns the digest of its weights."""
    origin = source_rows(plan)
    return write_torch_dist(
        folder,
        tensor_table(plan.target),
        plan.target,
        dtype=lambda row: source.dtype(origin[row.name]),
        read=lambda row: slice_tensor(origin[row.name], source.read(origin[row.name]), plan),
        group=group,
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
