"""FFNs of different widths → one width, for formats that know only one: neurons of zeros add nothing to a layer's output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import TensorRow
from minitron_megatron.checkpoint.torch_dist import MegatronSource


class WidenedSource:
    """A checkpoint's tensors as those of a model that is the same but for its FFNs, which are as wide or wider."""

    def __init__(self, source: MegatronSource, wide: Architecture) -> None:
        self._source = source
        self.arch = wide

    def dtype(self, row: TensorRow) -> torch.dtype:
        return self._source.dtype(row)

    def read(self, row: TensorRow, rows: range | None = None) -> Tensor:
        """The Megatron tensor of a row, or these of its rows: the first matrix's (gate and up) or the second one's columns, followed by zeros."""
        wide, had = row.shape(self.arch), row.shape(self._source.arch)
        if wide == had:
            return self._source.read(row, rows)
        rows = range(wide[0]) if rows is None else rows
        target = torch.zeros((len(rows), *wide[1:]), dtype=self.dtype(row))
        for first, kept in _held(rows, wide[0], had[0], parts=2 if row.axes[0] == "2F" else 1):
            goal = target[first - rows.start : first - rows.start + len(kept)]
            goal[tuple(slice(size) for size in (len(kept), *had[1:]))] = self._source.read(row, kept)
        return target


def _held(rows: range, wide: int, had: int, *, parts: int) -> Iterator[tuple[int, range]]:
    """First wide row, and the source's rows that lie from it on, of each part (gate, up) that the wide rows meet."""
    for part in range(parts):
        wide_first, had_first = part * wide // parts, part * had // parts
        start, stop = max(rows.start, wide_first), min(rows.stop, wide_first + had // parts)
        if start < stop:
            yield start, range(start - wide_first + had_first, stop - wide_first + had_first)
