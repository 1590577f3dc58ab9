"""Collectives with an explicit group."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass
class Gathering:
    """An all-gather under way."""

    gathered: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """[ranks, *shape]: every rank's tensor, in rank order."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.gathered


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of a group; x itself is left as it is."""
    total = x.clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def gather_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *x.shape]: every rank's x, in rank order."""
    return begin_gather_first(x, group).wait()


def begin_gather_first(x: Tensor, group: dist.ProcessGroup) -> Gathering:
    """The same, while this process goes on; x must stay as it is until wait() has returned."""
    if group.size() == 1:
        return Gathering(x.unsqueeze(0).clone(), None)
    gathered = x.new_empty((group.size(), *x.shape))
    flat = gathered.view(group.size() * x.shape[0], *x.shape[1:])
    return Gathering(gathered, dist.all_gather_into_tensor(flat, x.contiguous(), group=group, async_op=True))
