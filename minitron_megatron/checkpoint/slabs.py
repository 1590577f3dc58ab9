"""Tensors in slabs of rows: what a stream holds at a time, whatever the size of a vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import TensorRow

SLAB_BYTES = 16 << 20
AHEAD_BYTES = 32 << 20
"""Of slabs that are read before their turn."""


@dataclass(frozen=True)
class Slab:
    """Rows of the first dimension of a tensor of the table."""

    row: TensorRow
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    rows: range

    @property
    def is_whole(self) -> bool:
        return len(self.rows) == self.shape[0]

    @property
    def nbytes(self) -> int:
        return len(self.rows) * prod(self.shape[1:]) * self.dtype.itemsize


def slabs_of(
    rows: Iterable[TensorRow], arch: Architecture, dtype: Callable[[TensorRow], torch.dtype], slab_bytes: int | None = None
) -> Iterator[Slab]:
    """The tensors in order, each whole or in slabs of at most slab_bytes (one row at least); fused QKV rows belong together and stay so."""
    for row in rows:
        shape, kind = row.shape(arch), dtype(row)
        fitting = (slab_bytes or SLAB_BYTES) // (prod(shape[1:]) * kind.itemsize)
        step = shape[0] if row.axes[0] == "QKV" else max(1, fitting)
        for start in range(0, shape[0], step):
            yield Slab(row, shape, kind, range(start, min(start + step, shape[0])))
