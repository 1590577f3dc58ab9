"""Slices of one tensor under a plan: pure functions of (table row, tensor, plan).

Axes are those of the table of tensors: V, D, E, F, 2F, HK, K, QKV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minitron_megatron.checkpoint.tensors import TensorRow
from minitron_megatron.prune.plan import PrunePlan

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Type to move values of a size in: numpy knows no bf16."""


def slice_tensor(row: TensorRow, tensor: Tensor, plan: PrunePlan) -> Tensor:
    """What the plan keeps of a source tensor: rows and columns are chosen; values change in queries that take a residual, nowhere else."""
    if row.axes[0] == "QKV" and row.layer is not None and plan.head_residual.get(row.layer):
        tensor = with_residuals(tensor, plan, row.layer)
    return _select(tensor, [kept_indices(axis, row, plan) for axis in row.axes])


def slice_rows(row: TensorRow, rows: range, read: Callable[[range], Tensor], plan: PrunePlan) -> Tensor:
    """These rows of slice_tensor's result, out of the source rows between the first and the last of them; not of fused QKV rows.

    read: source rows → tensor. Kept units are in ascending order, so that slabs one after another read no source row twice.
    """
    kept, *others = (kept_indices(axis, row, plan) for axis in row.axes)
    if kept is None:
        return _select(read(rows), [None, *others])
    wanted = kept[rows.start : rows.stop]
    first, last = int(wanted[0]), int(wanted[-1])
    return _select(read(range(first, last + 1)), [wanted - first, *others])


def _select(tensor: Tensor, kept: Sequence[Tensor | None]) -> Tensor:
    """Chosen indices of each dimension, by numpy: torch's index_select of columns takes five times as long (torch 2.13, bf16)."""
    kind, bits = tensor.dtype, tensor.view(BITS[tensor.dtype.itemsize]).numpy()
    for dim, indices in enumerate(kept):
        if indices is not None:
            shape = (*bits.shape[:dim], len(indices), *bits.shape[dim + 1 :])
            # clip: with the check of each index it makes a copy of the result first
            bits = np.take(bits, indices.numpy(), axis=dim, out=np.empty(shape, bits.dtype), mode="clip")
    return torch.from_numpy(bits).view(kind)


def kept_indices(axis: str, row: TensorRow, plan: PrunePlan) -> Tensor | None:
    """Source indices along an axis, in the target's order; None where the axis is not cut."""
    if axis == "D" and plan.target.hidden < plan.source.hidden:
        return torch.tensor(plan.channels)
    layer = row.layer
    if layer is None:
        return None
    if axis == "E" and plan.target.experts < plan.source.experts:
        return torch.tensor(plan.experts[layer])
    if axis in ("F", "2F"):
        return _neurons(axis, row, layer, plan)
    if axis in ("HK", "QKV") and plan.target.heads < plan.source.heads:
        return head_columns(plan, layer) if axis == "HK" else qkv_rows(plan, layer)
    return None


def _neurons(axis: str, row: TensorRow, layer: int, plan: PrunePlan) -> Tensor | None:
    width = plan.source.ffn_width(layer)
    kept = plan.ffn[layer] if row.expert is None else plan.expert_ffn[layer][row.expert]
    if len(kept) == width:
        return None
    neurons = torch.tensor(kept)
    return neurons if axis == "F" else torch.cat([neurons, neurons + width])


def head_columns(plan: PrunePlan, layer: int) -> Tensor:
    """Columns of the output projection that belong to the kept heads."""
    return _spread(torch.tensor(plan.heads[layer]), plan.source.head_channels)


def qkv_rows(plan: PrunePlan, layer: int) -> Tensor:
    """Rows of the fused QKV weight: of each kept group the kept queries, then its key and its value."""
    size = plan.source.heads_per_group
    queries = query_blocks(torch.tensor(plan.heads[layer]), size).view(plan.target.kv_groups, -1)
    groups = torch.tensor(plan.kv_groups[layer])
    keys = groups * (size + 2) + size
    return _spread(torch.cat([queries, keys[:, None], keys[:, None] + 1], dim=1).flatten(), plan.source.head_channels)


def query_blocks(heads: Tensor, per_group: int) -> Tensor:
    """Where heads lie among the fused weight's blocks of K rows: a group's queries, its key, its value."""
    return heads + 2 * (heads // per_group)


def with_residuals(tensor: Tensor, plan: PrunePlan, layer: int) -> Tensor:
    """Fused QKV weight or bias in which kept queries have taken the residual of pruned ones: head + (head − pruned) (P1 section 2.3).

    Under grouped-query attention P1 adds it to queries alone: keys, values and the output projection stay. A bias belongs to the query
    whose rows it has (q = W x + b), so it changes with them. Computed in fp32 where weights are of a smaller type, rounded once.
    """
    pairs = plan.head_residual[layer]
    K, size = plan.source.head_channels, plan.source.heads_per_group
    kept, pruned = (_spread(query_blocks(torch.tensor(list(heads)), size), K) for heads in (pairs.keys(), pairs.values()))
    exact = torch.promote_types(tensor.dtype, torch.float32)
    head = tensor[kept].to(exact)
    changed = tensor.clone()
    changed[kept] = (head + (head - tensor[pruned].to(exact))).to(tensor.dtype)
    return changed


def _spread(blocks: Tensor, width: int) -> Tensor:
    """Indices of blocks → indices of their members."""
    return (blocks[:, None] * width + torch.arange(width)).flatten()
