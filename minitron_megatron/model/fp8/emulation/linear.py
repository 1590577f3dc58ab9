"""megatron-core's tensor-parallel linears with operands that are rounded as FP8 would round them.

Legend: S sequence, s this rank's part of it, B samples of a micro-batch, N tokens (S·B), n of this rank, I input features, O output
features of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.errors import RecipeError
from minitron_megatron.model.fp8.emulation.delayed import DelayedScaling
from minitron_megatron.model.fp8.emulation.scaling import BlockScaling, LinearScaling, Rounded, TensorwiseScaling, Types
from minitron_megatron.parallel.collectives import gather_first
from minitron_megatron.platform.versions import submodules_of


class Ranks(NamedTuple):
    """What a linear exchanges with its tensor ranks."""

    group: dist.ProcessGroup | None
    shares_sequence: bool
    """The input is gathered along the sequence, its gradient reduced and scattered."""
    sums_gradient: bool
    """The input's gradient is summed."""

    def gathered(self, x_nI: Tensor) -> Tensor:
        return gather_first(x_nI, self.group).flatten(0, 1) if self.group and self.shares_sequence else x_nI

    def reduced(self, gradient_NI: Tensor) -> Tensor:
        if self.group and self.shares_sequence:
            own = gradient_NI.new_empty(gradient_NI.shape[0] // self.group.size(), gradient_NI.shape[1])
            dist.reduce_scatter_tensor(own, gradient_NI.contiguous(), group=self.group)
            return own
        if self.group and self.sums_gradient:
            dist.all_reduce(gradient_NI, group=self.group)
        return gradient_NI


class RoundedProduct(torch.autograd.Function):
    """input · weightᵀ and its two gradients, each a product of two rounded matrices in fp32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input_sBI: Tensor, weight_OI: Tensor, rounded_input: Rounded, rounded_weight: Rounded, scaling: LinearScaling, ranks: Ranks
    ) -> Tensor:
        ctx.save_for_backward(rounded_input.along_columns, rounded_weight.along_columns)
        ctx.scaling, ctx.ranks, ctx.shape, ctx.dtypes = scaling, ranks, input_sBI.shape, (input_sBI.dtype, weight_OI.dtype)
        output_NO = ranks.gathered(rounded_input.along_rows) @ rounded_weight.along_rows.T
        sequence = ranks.group.size() * ctx.shape[0] if ranks.group and ranks.shares_sequence else ctx.shape[0]
        return output_NO.to(input_sBI.dtype).view(sequence, *ctx.shape[1:-1], weight_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient_SBO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input_nI, weight_OI = ctx.saved_tensors
        gradient = ctx.scaling.gradient(gradient_SBO.flatten(0, -2))
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        of_input = of_weight = None
        if needs_input:
            partial_NI = (gradient.along_rows @ weight_OI).to(ctx.dtypes[0])
            of_input = ctx.ranks.reduced(partial_NI).view(ctx.shape)
        if needs_weight:
            of_weight = (gradient.along_columns.T @ ctx.ranks.gathered(input_nI)).to(ctx.dtypes[1])
        return of_input, of_weight, None, None, None, None


class EmulatedLinear(nn.Module):
    """What both linears share: megatron's forward calls `_forward_impl` for the product alone, around which its collectives stay."""

    scaling: Any
    config: Any
    tp_group: Any

    weight_is_rounded: bool
    """Of a frozen model: FP8 is all that its weights are."""

    def _emulate(self, input_group: dist.ProcessGroup | None) -> None:
        fp8: ModelFp8 = self.config.emulated_fp8
        self.scaling, self.weight_is_rounded = linear_scaling(fp8, input_group), False
        if fp8.weights:
            self.register_load_state_dict_post_hook(_round_frozen_weight)

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        **_: Any,
    ) -> Tensor:
        rounded_input = self.scaling.input(input.detach().flatten(0, -2))
        rounded_weight = Rounded(*[weight.float()] * 2) if self.weight_is_rounded else self.scaling.weight(weight.detach())
        ranks = Ranks(tp_group, sequence_parallel, allreduce_dgrad)
        product = RoundedProduct.apply(input, weight, rounded_input, rounded_weight, self.scaling, ranks)
        return product if bias is None else product + bias


class EmulatedColumnParallelLinear(EmulatedLinear, ColumnParallelLinear):
    """linear_qkv and linear_fc1."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        ColumnParallelLinear.__init__(self, *arguments, **keywords)
        self._emulate(self.tp_group if self.sequence_parallel and not self.explicit_expert_comm else None)


class EmulatedRowParallelLinear(EmulatedLinear, RowParallelLinear):
    """linear_proj and linear_fc2. The output's gradient is gathered along the sequence ahead of them: its largest value is that of all ranks."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        RowParallelLinear.__init__(self, *arguments, **keywords)
        self._emulate(None)


def linear_scaling(fp8: ModelFp8, input_group: dist.ProcessGroup | None) -> LinearScaling:
    """input_group: of the ranks that share the input's sequence. Raises RecipeError for what is not emulated."""
    types = Types.of(fp8)
    match fp8.scaling:
        case "delayed":
            return DelayedScaling(fp8, types)
        case "tensorwise":
            return TensorwiseScaling(types, input_group)
        case "blockwise":
            return BlockScaling(types, length=128, weight_height=128)
        case "mxfp8":
            return BlockScaling(types, length=32, weight_height=1, mx=True)
    raise RecipeError("fp8: nvfp4 is not emulated (it rounds at random, behind random Hadamard transforms); choose mxfp8, or run on Blackwell")


def put_emulated_linears(submodules: Any) -> None:
    """The emulated classes into megatron's spec of a layer: attention's and the FFN's linears, those of experts too; no router, no norm."""
    kinds: dict[Any, type] = {ColumnParallelLinear: EmulatedColumnParallelLinear, RowParallelLinear: EmulatedRowParallelLinear}
    for name, entry in list(vars(submodules).items()):
        if isinstance(entry, type) and entry in kinds:
            setattr(submodules, name, kinds[entry])
        elif (inner := submodules_of(entry)) is not None:
            put_emulated_linears(inner)


def _round_frozen_weight(module: Any, _: Any) -> None:
    """A frozen model's weights are rounded as they are loaded, not at every pass."""
    if not module.weight.requires_grad:
        module.weight.data.copy_(module.scaling.weight(module.weight.data).along_rows)
        module.weight_is_rounded = True
