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
        self._wide = wide

    def dtype(self, row: TensorRow) -> torch.dtype:
        return self._source.dtype(row)

    def read(self, row: TensorRow) -> Tensor:
        """The Megatron tensor of a row: gate and up rows, or columns of the second matrix, followed by zeros."""
        tensor = self._source.read(row)
        if row.axes[0] == "2F":
            missing = row.shape(self._wide)[0] // 2 - len(tensor) // 2
            return torch.cat([pad(half, (0, 0, 0, missing)) for half in tensor.chunk(2)]) if missing else tensor
        missing = row.shape(self._wide)[-1] - tensor.shape[-1] if row.axes[-1] == "F" else 0
        return pad(tensor, (0, missing)) if missing else tensor
