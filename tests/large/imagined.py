"""Worker processes that play any rank of any number of ranks: tensors on the meta device, process groups that nobody else is in.

megatron is loaded aimed at the device "meta" as it is aimed at "cpu" elsewhere (platform/retarget.py), and torch's fake backend lets one process
be any rank of a group: collectives return at once. Both last as long as the process, which is why these tests have processes of their own.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from minitron_megatron.parallel.world import World
from minitron_megatron.platform import activate, cuda_for_cpu, retarget

META = torch.device("meta")
KINDS = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}
META_CONSTANTS = {"cuda": "meta", "cpu": "meta"} | {
    f"torch.cuda.{kind}Tensor": torch.empty(0, dtype=dtype, device=META).type() for kind, dtype in KINDS.items()
}


class CudaToMeta(retarget.CudaToCpu):
    """Nothing is ever computed or copied out: what megatron puts on a GPU, or fetches from it, stays without data."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, str) or node.value not in META_CONSTANTS:
            return node
        return self._replace(node, ast.Constant(META_CONSTANTS[node.value]))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """x.cuda(...) and x.cpu() → x.to("meta")."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "cpu"):
            return self._replace(node, ast.Call(ast.Attribute(node.func.value, "to", ast.Load()), [ast.Constant("meta")], []))
        return node


def aim_at_meta() -> None:
    """To be called in a new process, ahead of the first import of megatron."""
    identity = retarget._hook_identity() + Path(__file__).read_bytes()  # of the cache of rewritten sources: these are others
    retarget.CudaToCpu = CudaToMeta  # type: ignore[misc]
    retarget._hook_identity = lambda: identity  # type: ignore[assignment]
    activate("cpu")
    cuda_for_cpu.current_device = lambda: "meta"
    import torch.distributed._meta_registrations  # collectives of meta tensors
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - the backend
    from megatron.core import parallel_state

    from . import ranks  # noqa: F401 - with all of megatron that it needs

    dist.new_group = distributed_c10d.new_group = for_members(distributed_c10d.new_group)
    parallel_state.create_group = for_members(parallel_state.create_group)
    dist.all_gather_object = everybody_says_the_same
    parallel_state.generate_masked_orthogonal_rank_groups = known(parallel_state.generate_masked_orthogonal_rank_groups)
    gc.collect()
    gc.freeze()  # megatron collects garbage at each state of an optimizer: of what comes now, not of all modules


class Imagined:
    """Which rank this process is at the moment."""

    rank = 0


def for_members(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """new_group of the default backend, gloo's groups too. torch walks through a group's ranks before it finds that this process is not
    among them; of the thousands that megatron makes for a thousand ranks two dozen are this process's."""

    def make(ranks: Sequence[int] | None = None, timeout: Any = None, backend: str | None = None, **others: Any) -> Any:
        if ranks is not None and Imagined.rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks=ranks, timeout=timeout, **others)

    return make


def everybody_says_the_same(objects: list[Any], mine: Any, group: Any = None) -> None:
    """What torch's fake backend makes of all_gather_object, without a thousand copies; megatron asks for names of parameter groups."""
    objects[:] = [mine] * len(objects)


def known(rank_groups: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
    """megatron's lists of ranks, which are the same for every rank, made once."""
    once = cache(lambda size, sizes, mask: rank_groups(size, list(sizes), list(mask)))
    return lambda size, sizes, mask: once(size, tuple(sizes), tuple(mask))


@contextmanager
def imagined_world(rank: int, size: int) -> Iterator[World]:
    """This process as one of `size`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from minitron_megatron.parallel.layout import destroy_layout

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    Imagined.rank = rank
    try:
        yield World(replace(activate("cpu"), device=META), rank, size)
    finally:
        destroy_layout()
        dist.destroy_process_group()
