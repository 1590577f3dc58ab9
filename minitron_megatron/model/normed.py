"""The normed states that a layer's attention and FFN read, wherever the layer spec keeps their norms.

The local spec has a module for each norm, whose output is the state. Transformer Engine keeps the norm inside the linear layer behind it
(`linear_qkv`, `linear_fc1`) and hands out the product only: there the state is computed anew from the layer's input.

Legend: D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

See = Callable[[Callable[[], Tensor], Tensor], Tensor | None]
"""(the normed state, on demand; what the module hands on) → what is handed on in its place, or None to leave it."""


def attention_norm(layer: Any) -> nn.Module:
    """The module of a TransformerLayer that norms what its attention reads."""
    return _fused_or(getattr(layer.self_attention, "linear_qkv", None), layer.input_layernorm)


def mlp_norm(layer: Any) -> nn.Module:
    """The module of a TransformerLayer that norms what its FFN reads; ahead of experts it is always one of its own."""
    return _fused_or(getattr(layer.mlp, "linear_fc1", None), layer.pre_mlp_layernorm)


def on_state(module: nn.Module, see: See) -> RemovableHandle:
    """Calls `see` at every forward pass of a module whose output is a state, or of a linear layer that holds a norm.

    A forward hook in both cases, never one ahead of the forward pass: with overlap_param_gather megatron's wrapper waits for a module's
    parameters in such a hook of its own, which is registered later, and the norm would be computed with those of the last step.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not holds_norm(module):
            return see(lambda: output, output)
        product, bias = output
        replaced = see(lambda: _recomputed_norm(module, inputs[0]), product)
        return None if replaced is None else (replaced, bias)

    return module.register_forward_hook(hook)


def holds_norm(module: nn.Module | None) -> bool:
    """Whether a linear layer norms its input itself."""
    return hasattr(module, "layer_norm_weight")


def fused_norm(linear: Any, x: Tensor) -> Tensor:
    """[…, D] what the norm inside a linear layer makes of x: in fp32 at least, rounded once, as Transformer Engine's kernels do."""
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = linear.layer_norm_weight.to(exact)
    if linear.zero_centered_gamma:
        weight = weight + 1
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x.to(exact), x.shape[-1:], weight, linear.eps).to(x.dtype)
    return F.layer_norm(x.to(exact), x.shape[-1:], weight, linear.layer_norm_bias.to(exact), linear.eps).to(x.dtype)


def _fused_or(linear: nn.Module | None, norm: nn.Module) -> nn.Module:
    return linear if linear is not None and holds_norm(linear) else norm


def _recomputed_norm(linear: nn.Module, x: Tensor) -> Tensor:
    """With gradients computed once more in backward: the fp32 copies of the state would stay till then."""
    if not torch.is_grad_enabled():
        return fused_norm(linear, x)
    state: Tensor = checkpoint(fused_norm, linear, x, use_reentrant=False, preserve_rng_state=False)
    return state
