"""How the three tensors of a linear are rounded: input and weight in a forward pass, the output's gradient in a backward pass.

Legend: N tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.model.fp8.emulation.rounding import E4M3, E5M2, amax_of, block_rounded, rounded, scale_of


class Rounded(NamedTuple):
    """A matrix twice, fp32: blocks run along the dimension that a product sums over. One tensor where nothing runs along a dimension."""

    along_rows: Tensor
    """For products that sum over the last dimension."""
    along_columns: Tensor
    """For products that sum over the first dimension; those of a backward pass alone, and not made where none will come."""


class LinearScaling(Protocol):
    """The rounding of one linear."""

    def input(self, input_NI: Tensor) -> Rounded: ...

    def weight(self, weight_OI: Tensor) -> Rounded: ...

    def gradient(self, gradient_NO: Tensor) -> Rounded: ...


class Types(NamedTuple):
    """Of a linear's forward and backward operands."""

    forward: torch.dtype
    backward: torch.dtype

    @staticmethod
    def of(fp8: ModelFp8) -> Types:
        return Types(E4M3, E5M2 if fp8.format == "hybrid" else E4M3)


class TensorwiseScaling:
    """Current scaling: a tensor's own largest value sets its scale."""

    def __init__(self, types: Types, input_group: dist.ProcessGroup | None = None) -> None:
        """input_group: over which the input's largest value is taken, where each rank has a part of the sequence."""
        self._types, self._input_group = types, input_group

    def input(self, input_NI: Tensor) -> Rounded:
        amax = amax_of(input_NI)
        if self._input_group is not None:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self._input_group)
        return by_scale(input_NI, scale_of(amax, self._types.forward), self._types.forward)

    def weight(self, weight_OI: Tensor) -> Rounded:
        return by_scale(weight_OI, scale_of(amax_of(weight_OI), self._types.forward), self._types.forward)

    def gradient(self, gradient_NO: Tensor) -> Rounded:
        return by_scale(gradient_NO, scale_of(amax_of(gradient_NO), self._types.backward), self._types.backward)


class BlockScaling:
    """A scale for each block: blockwise (arXiv 2412.19437, section 3.3), or MX (arXiv 2310.10537).

    length: of a block along the summed dimension; weight_height: rows of a weight's block, across it.
    """

    def __init__(self, types: Types, *, length: int, weight_height: int, mx: bool = False) -> None:
        self._types, self._length, self._weight_height, self._mx = types, length, weight_height, mx

    def input(self, input_NI: Tensor) -> Rounded:
        return self._rounded(input_NI, self._types.forward, backward=torch.is_grad_enabled())

    def weight(self, weight_OI: Tensor) -> Rounded:
        return self._rounded(weight_OI, self._types.forward, self._weight_height, backward=torch.is_grad_enabled())

    def gradient(self, gradient_NO: Tensor) -> Rounded:
        return self._rounded(gradient_NO, self._types.backward)

    def _rounded(self, x: Tensor, dtype: torch.dtype, height: int = 1, *, backward: bool = True) -> Rounded:
        along_rows = block_rounded(x, dtype, (height, self._length), mx=self._mx)
        if height == self._length or not backward:
            return Rounded(along_rows, along_rows)
        return Rounded(along_rows, block_rounded(x, dtype, (self._length, height), mx=self._mx))


def by_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Rounded:
    """One scale for the whole matrix."""
    whole = rounded(x, scale, dtype)
    return Rounded(whole, whole)
