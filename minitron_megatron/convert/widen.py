"""FFNs of different widths → one width, for formats that know only one: neurons of zeros add nothing to a layer's output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

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

    def read(self, row: TensorRow) -> Tensor:
        """The Megatron tensor of a row: rows of the first matrix (gate and up), or columns of the second, followed by zeros."""
        tensor, wide = self._source.read(row), row.shape(self.arch)
        missing = [size - had for size, had in zip(wide, tensor.shape, strict=True)]
        if not any(missing):
            return tensor
        if row.axes[0] == "2F":
            return torch.cat([pad(half, (0, 0, 0, missing[0] // 2)) for half in tensor.chunk(2)])
        return pad(tensor, (0, missing[-1], 0, missing[0]) if len(missing) > 1 else (0, missing[0]))
