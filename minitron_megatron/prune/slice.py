"""Slices of one tensor under a plan: pure functions of (table row, tensor, plan).

Axes are those of the table of tensors: V, D, E, F, 2F, HK, K, QKV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_megatron.checkpoint.tensors import TensorRow
from minitron_megatron.prune.plan import PrunePlan


def slice_tensor(row: TensorRow, tensor: Tensor, plan: PrunePlan) -> Tensor:
    """What the plan keeps of a source tensor: rows and columns are chosen, values never change."""
    for dim, axis in enumerate(row.axes):
        kept = kept_indices(axis, row, plan)
        if kept is not None:
            tensor = tensor.index_select(dim, kept)
    return tensor


def kept_indices(axis: str, row: TensorRow, plan: PrunePlan) -> Tensor | None:
    """Source indices along an axis, in the target's order; None where the axis is not cut."""
    if axis == "D" and plan.target.hidden < plan.source.hidden:
        return torch.tensor(plan.channels)
    layer = row.layer
    if layer is None:
        return None
    if axis == "E" and plan.target.experts < plan.source.experts:
        return torch.tensor(plan.experts[layer])
    if axis in ("F", "2F") and plan.target.ffn < plan.source.ffn:
        neurons = torch.tensor(plan.ffn[layer] if row.expert is None else plan.expert_ffn[layer][row.expert])
        return neurons if axis == "F" else torch.cat([neurons, neurons + plan.source.ffn])
    if axis in ("HK", "QKV") and plan.target.heads < plan.source.heads:
        return head_columns(plan, layer) if axis == "HK" else qkv_rows(plan, layer)
    return None


def head_columns(plan: PrunePlan, layer: int) -> Tensor:
    """Columns of the output projection that belong to the kept heads."""
    return _spread(torch.tensor(plan.heads[layer]), plan.source.head_channels)


def qkv_rows(plan: PrunePlan, layer: int) -> Tensor:
    """Rows of the fused QKV weight: in each group the kept queries, then its key and its value, which stay."""
    source, size = plan.source, plan.source.heads_per_group
    kept = torch.tensor(plan.heads[layer]).view(source.kv_groups, -1)
    blocks = []
    for group in range(source.kv_groups):
        start = group * (size + 2)  # blocks of K rows: the group's queries, its key, its value
        blocks += [kept[group] - group * size + start, torch.tensor([start + size, start + size + 1])]
    return _spread(torch.cat(blocks), source.head_channels)


def _spread(blocks: Tensor, width: int) -> Tensor:
    """Indices of blocks → indices of their members."""
    return (blocks[:, None] * width + torch.arange(width)).flatten()
