"""Modules of the layer spec that needs neither Transformer Engine nor apex, and which spec a model has.

Legend: S sequence, B batch, D hidden, h this rank's query heads, g this rank's key/value groups, K head channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from minitron_megatron.arch.families import Family
from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.model.context_attention import context_attention
from minitron_megatron.model.engine_spec import engine_block_spec
from minitron_megatron.model.experts import layer_spec
from minitron_megatron.model.fp8.emulation.linear import put_emulated_linears
from minitron_megatron.platform.rms_norm import rms_norm
from minitron_megatron.platform.short_attention import is_short, short_attention


def family_settings(family: Family) -> dict[str, Any]:
    """TransformerConfig arguments for a family's norm and the activation of its FFN."""
    norms: dict[str, dict[str, Any]] = {
        "rmsnorm": {"normalization": "RMSNorm"},
        "layernorm1p": {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    }
    activations = {"swiglu": F.silu, "squared_relu": squared_relu}
    return {**norms[family.norm], "gated_linear_unit": family.is_gated, "activation_func": activations[family.activation]}


class RMSNorm(nn.Module):
    """RMSNorm with sequence parallelism; megatron-core's own fallback refuses it without Transformer Engine."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # its gradient is a sum over a sequence shard, which finalize_model_grads completes over the tensor ranks
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - megatron's mark on a Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x and result: [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm1p(nn.Module):
    """LayerNorm whose weight is kept as its distance from 1, with sequence parallelism (Nemotron-4, arXiv 2402.16819, section 2).

    megatron-core's own fallback refuses both without Transformer Engine or apex.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - see RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        """x and result: [..., hidden_size]."""
        return F.layer_norm(x, (x.shape[-1],), self.weight + 1, self.bias, self.eps)


def norm_of(config: TransformerConfig) -> type[nn.Module]:
    """The class of every norm in a model."""
    return LayerNorm1p if config.layernorm_zero_centered_gamma else RMSNorm


class CausalAttention(nn.Module):
    """Core attention through torch's scaled_dot_product_attention, which keeps no [S, S] scores; short sequences in bf16 on a CPU go another way,
    and so do those that context ranks share."""

    def __init__(
        self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, pg_collection: ProcessGroupCollection | None = None, **__: Any
    ) -> None:
        super().__init__()
        self.context = pg_collection.cp if pg_collection and config.context_parallel_size > 1 else None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query_SBhK: Tensor, key_SBgK: Tensor, value_SBgK: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Returns [S, B, h·K]. The mask is always causal; what attention_mask says is not read.

        Where keys of earlier tokens are cached there is one query, which sees them all.
        """
        if self.context is not None:
            return context_attention(query_SBhK, key_SBgK, value_SBgK, self.softmax_scale, self.context)
        if is_short(query_SBhK, key_SBgK):
            return short_attention(query_SBhK, key_SBgK, value_SBgK, self.softmax_scale)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBhK, key_SBgK, value_SBgK))
        grouped = query.shape[1] != key.shape[1]
        causal = query.shape[2] == key.shape[2]
        context_BhSK = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped)
        return context_BhSK.permute(2, 0, 1, 3).flatten(2)


def local_layer_spec(config: TransformerConfig, *, emulated: bool = False) -> ModuleSpec:
    """megatron-core's local layer with our norm and core attention in it; emulated: with linears that round as FP8 would."""
    spec = layer_spec(config)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm_of(config)
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if emulated:
        put_emulated_linears(layer)
    return spec


def block_spec(config: TransformerConfig, layers: range) -> TransformerBlockSubmodules:
    """The spec of one pipeline stage; layers: its own, counted from 0 over the whole model. platform/activate.py says whose modules they are."""
    if config.transformer_impl == "transformer_engine":
        return engine_block_spec(config, len(layers), CausalAttention)
    fp8: ModelFp8 | None = getattr(config, "emulated_fp8", None)
    specs = {emulated: local_layer_spec(config, emulated=emulated) for emulated in (False, True)}
    of_layers = [specs[fp8 is not None and fp8.covers(layer, config.num_layers)] for layer in layers]
    return TransformerBlockSubmodules(layer_specs=of_layers, layer_norm=norm_of(config))
