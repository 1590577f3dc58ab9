"""Delayed scaling's memory of Transformer Engine's linear layers, and how a pass leaves it as it was.

A layer keeps for its forward and its backward pass the largest values of earlier passes (`amax_history`, [passes, tensors]) and the scales that
follow (`scale`, [tensors]). Each is the same on every rank of megatron's amax group: tensor, context and data parallel.
"""

from __future__ import annotations

from typing import Any

from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor, nn

PASSES = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
"""Of a layer; Transformer Engine's names."""


def engine_scaling_state(module: nn.Module) -> dict[str, Tensor]:
    """A linear layer's own tensors by name, to be read and to be filled in place; none of other modules and of other scalings."""
    if not _scales_with_delay(module):
        return {}
    layer: Any = module
    if not layer.fp8_meta_tensors_initialized:  # before its first pass it has none to fill
        layer.fp8_meta["num_gemms"] = getattr(layer, "num_gemms", 1)
        layer.init_fp8_meta_tensors(get_fp8_recipe(layer.config))
    states = {name: layer.fp8_meta[key] for name, key in PASSES.items()}
    return {f"{name}.{kind}": getattr(state, kind) for name, state in states.items() for kind in ("amax_history", "scale")}


def _scales_with_delay(module: nn.Module) -> bool:
    """Linear layers alone: attention has scaling of its own only where its products are FP8, which megatron's config leaves out."""
    config = getattr(module, "config", None)
    is_linear = hasattr(module, "fp8_meta") and hasattr(module, "fuse_wgrad_accumulation")
    return is_linear and config is not None and bool(config.fp8) and config.fp8_recipe == Fp8Recipe.delayed
