"""Layers of Transformer Engine's modules, through megatron-core: norm and linear in one, its attention, its grouped linears for experts.

One spec serves every family: these modules read the norm's kind, the zero-centred weight, the qkv bias and the activation from the config.
In fp32 its attention has neither FlashAttention's nor cuDNN's products and keeps [S, S] scores: there the attention is torch's.
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def engine_layer_spec(config: TransformerConfig, attention_fp32: type[nn.Module]) -> ModuleSpec:
    """megatron-core's own layer; every module in it is given the layout's groups by the layer, so that a teacher has its own.

    attention_fp32: the core attention of models in fp32.
    """
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    if config.params_dtype == torch.float32:
        spec.submodules.self_attention.submodules.core_attention = attention_fp32
    return spec


def engine_block_spec(config: TransformerConfig, layers: int, attention_fp32: type[nn.Module]) -> TransformerBlockSubmodules:
    """The spec of one pipeline stage with this many layers."""
    return TransformerBlockSubmodules(layer_specs=[engine_layer_spec(config, attention_fp32)] * layers, layer_norm=TENorm)
