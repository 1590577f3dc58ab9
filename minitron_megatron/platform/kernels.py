"""How element-wise work over tensors that are larger than a cache is carried out: compiled into single kernels on CUDA, in blocks on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

CPU_BLOCK_BYTES = 8 << 20
"""A handful of intermediate results of this size fit into the third-level cache of a CPU."""


def block_bytes(device: torch.device) -> int | None:
    """Size of a piece whose intermediate results stay in the cache; None: all at once, because a compiled kernel has none."""
    return CPU_BLOCK_BYTES if device.type == "cpu" else None


def elementwise(function: Callable[P, R], device: torch.device) -> Callable[P, R]:
    """The function, compiled so that on CUDA it reads its arguments and writes its results once.

    The CPU goes without: its compiler takes minutes to gain what blocks that stay in the cache have already gained.
    """
    return function if device.type == "cpu" else _compiled(function)


@cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function)
