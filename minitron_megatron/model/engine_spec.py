"""Layers of Transformer Engine's modules, through megatron-core: norm and linear in one, its attention, its grouped linears for experts.

One spec serves every family: these modules read the norm's kind, the zero-centred weight, the qkv bias and the activation from the config.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


def engine_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """megatron-core's own layer; every module in it is given the layout's groups by the layer, so that a teacher has its own."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )


def engine_block_spec(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    """The spec of one pipeline stage with this many layers."""
    return TransformerBlockSubmodules(layer_specs=[engine_layer_spec(config)] * layers, layer_norm=TENorm)
