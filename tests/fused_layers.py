"""A layer spec whose modules are laid out as Transformer Engine's, of plain torch: norm and linear in one, all experts' matrices in one module.

What stands for te.LayerNormLinear and te.GroupedLinear has their attributes, parameters' names and sharded state dicts (read in Transformer
Engine 2.11 and in megatron-core 0.16.1's wrappers), so that a CPU shows what depends on the places and not on the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from minitron_megatron.model import gpt
from minitron_megatron.model.modules import local_layer_spec, norm_of
from minitron_megatron.platform.versions import submodules_of


class FusedLinear(ColumnParallelLinear):
    """As te.LayerNormLinear: the norm is inside, the product alone comes out."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **more: Any) -> None:
        super().__init__(input_size, output_size, config=config, **more)
        self.normalization, self.eps = config.normalization, config.layernorm_epsilon
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_bias = nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype)) if self.normalization == "LayerNorm" else None
        for parameter in filter(lambda found: found is not None, (self.layer_norm_weight, self.layer_norm_bias)):
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        weight = self.layer_norm_weight + 1 if self.zero_centered_gamma else self.layer_norm_weight
        if self.layer_norm_bias is None:
            normed = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight
        else:
            centred = x - x.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight + self.layer_norm_bias
        return super().forward(normed)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        state = {f"{name}": parameter for name, parameter in self.named_parameters()}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets, **groups)


class GroupedLinear(nn.Module):
    """As te.GroupedLinear: weight0, weight1, …, and tokens expert after expert."""

    def __init__(self, experts: int, input_size: int, output_size: int, *, config: TransformerConfig, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self._experts, self._groups = experts, pg_collection
        for number in range(experts):
            weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            setattr(weight, "allreduce", config.expert_model_parallel_size == 1)  # noqa: B010
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x_NC: Tensor, per_expert: list[int]) -> tuple[Tensor, None]:
        parts = zip(x_NC.split(per_expert), self.parameters(), strict=True)
        return torch.cat([part @ weight.t() for part, weight in parts]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        groups, found = self._groups, {}
        for number, weight in enumerate(self.parameters()):
            place = (len(sharded_offsets), groups.ep.rank() * self._experts + number, groups.ep.size() * self._experts)
            part = make_sharded_tensors_for_checkpoint(
                {"weight": weight}, "", {}, (*sharded_offsets, place), tp_group=groups.expt_tp, dp_cp_group=metadata["dp_cp_group"]
            )
            part["weight"].replica_id = (*part["weight"].replica_id[:2], groups.expt_dp.rank())
            replace_prefix_for_sharding(part, "", prefix)
            found[f"{prefix}weight{number}"] = part["weight"]
        return found


def fused_block_spec(config: TransformerConfig, layers: range) -> TransformerBlockSubmodules:
    spec = local_layer_spec(config)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm, attention.linear_qkv = IdentityOp, FusedLinear
    layer.sharded_state_dict_keys_map = {}
    if config.num_moe_experts:
        kind = partial if isinstance(layer.mlp, partial) else ModuleSpec
        submodules_of(layer.mlp).experts = kind(TEGroupedMLP, submodules=MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear))
    else:
        layer.pre_mlp_layernorm, submodules_of(layer.mlp).linear_fc1 = IdentityOp, FusedLinear
    return TransformerBlockSubmodules(layer_specs=[spec] * len(layers), layer_norm=norm_of(config))


@contextmanager
def fused_layers() -> Iterator[None]:
    """Models that are built inside have this spec."""
    with mock.patch.object(gpt, "block_spec", fused_block_spec):
        yield
