"""Collectives with an explicit group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of a group; x itself is left as it is."""
    total = x.clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def gather_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *x.shape]: every rank's x, in rank order."""
    gathered = x.new_empty((group.size(), *x.shape))
    if group.size() == 1:
        gathered[0] = x
    else:
        dist.all_gather_into_tensor(gathered.view(group.size() * x.shape[0], *x.shape[1:]), x.contiguous(), group=group)
    return gathered
