"""Mixture of experts: what it adds to megatron's config and layer spec, and equal numbers of forward passes.

Legend: E experts, S sequence, B samples of a micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.fp8 import MULTIPLE
from minitron_megatron.data.batches import Batch, filler
from minitron_megatron.errors import PlatformError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.platform import Platform


def expert_settings(arch: Architecture, layout: Layout, platform: Platform) -> dict[str, Any]:
    """TransformerConfig arguments of a model with experts; none for a dense one.

    No balancing loss: the teacher's routing is what the student learns to follow. The router computes in fp32, as its softmax does in transformers.
    """
    if not arch.experts:
        return {}
    if platform.kind == "cuda" and not platform.transformer_engine:
        # its name te_general_gemm is undefined then; on CPU platform/retarget.py defines it
        raise PlatformError(
            "experts on CUDA need Transformer Engine, which megatron-core's router calls; install it (minitron doctor says which versions), "
            "or set platform=cpu"
        )
    return {
        "num_moe_experts": arch.experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.ffn,
        # after top-k a softmax over the chosen: their weights sum to 1; before it: shares of a softmax over all
        "moe_router_pre_softmax": not arch.normalised_routing,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": layout.expert,
        "moe_grouped_gemm": platform.transformer_engine,
    }


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """megatron-core's local layer, with one MLP after another for the experts where there are some."""
    experts = config.num_moe_experts
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm, num_experts=experts)
    if experts:
        # Transformer Engine fuses no norm into a layer of experts, so checkpoints name it by its own module
        names = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = {ours: theirs for ours, theirs in names.items() if ours != "pre_mlp_layernorm."}
    return spec


def same_number_of_passes(batches: list[Batch], layout: Layout, device: torch.device) -> list[Batch]:
    """Fills up to the longest list among ranks that share experts, with batches that count for nothing.

    Every forward pass exchanges tokens among these ranks: one that had less to do would leave the others waiting for ever.
    """
    if layout.expert == 1:
        return batches
    most = torch.tensor([len(batches)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=layout.groups.ep)
    missing = int(most) - len(batches)
    return [*batches, *[filler(batches[-1] if batches else _made_from_nothing(device))] * missing] if missing else batches


def _made_from_nothing(device: torch.device) -> Batch:
    """Every pipeline stage of a rank without micro-batches takes the same; as many tokens as FP8 products of any scaling divide."""
    positions = torch.arange(max(MULTIPLE.values()), device=device)[None]
    tokens = torch.zeros_like(positions)
    return Batch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.float32), positions, tokens[:, 0])
