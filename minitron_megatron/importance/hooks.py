"""Forward hooks that collect token sums of one micro-batch; they do not communicate, reduce or score.

What is scored (P1 section 2.2): a head by its output before the projection, an FFN neuron by the input of the second matrix, an
embedding channel by the outputs of both norms of every layer; a layer by Block Influence (P2 section 2.2).

Legend: S this rank's tokens of a sample, B samples, C this rank's units, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minitron_megatron.importance.experts import ExpertSums, hook_experts, is_sparse
from minitron_megatron.scores.statistics import INFLUENCE


class MicroBatchSums:
    """What the hooks saw of one micro-batch: key (global layer, axis) → Σ|x|, Σx, Σx² [3, B, C], and the cosines."""

    def __init__(self) -> None:
        self.token_sums: dict[tuple[int, str], Tensor] = {}
        self.cosine_sums: dict[tuple[int, str], Tensor] = {}
        """Key (first layer, influence axis) → [B] Σ over tokens."""
        self.experts: dict[int, ExpertSums] = {}
        """Global layer → its experts on this rank, whose samples may be other ranks'."""
        self.sample_ids_B = torch.empty(0, dtype=torch.int64)
        """Of the micro-batch that is under way; only experts need to know."""

    def clear(self) -> None:
        self.token_sums.clear()
        self.cosine_sums.clear()
        for experts in self.experts.values():
            experts.clear()


@contextmanager
def collecting(layers: Iterable[nn.Module]) -> Iterator[MicroBatchSums]:
    """Hooks on these layers, all that this process holds, while the context is open."""
    found = MicroBatchSums()
    handles = [handle for layer in layers for handle in _hook_layer(layer, found)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook_layer(layer: Any, found: MicroBatchSums) -> list[Any]:
    number = layer.layer_number - 1  # megatron counts from 1
    return [
        *_hook_mlp(layer.mlp, number, found),
        layer.self_attention.linear_proj.register_forward_pre_hook(_sums_of_input(found, (number, "heads"))),
        layer.input_layernorm.register_forward_hook(_sums_of_output(found, (number, "attention_norm"))),
        layer.pre_mlp_layernorm.register_forward_hook(_sums_of_output(found, (number, "mlp_norm"))),
        layer.register_forward_hook(_cosine(found, number), with_kwargs=True),
    ]


def _hook_mlp(mlp: Any, number: int, found: MicroBatchSums) -> list[Any]:
    if not is_sparse(mlp):
        return [mlp.linear_fc2.register_forward_pre_hook(_sums_of_input(found, (number, "ffn")))]
    found.experts[number] = ExpertSums(mlp.token_dispatcher, len(mlp.experts.local_experts))
    return hook_experts(mlp, found.experts[number], lambda: found.sample_ids_B)


def token_sums(x_SBC: Tensor) -> Tensor:
    """[3, B, C] fp32: Σ|x|, Σx, Σx² over tokens."""
    x = x_SBC.float()  # fp32: squares of bf16 activations lose small units over many tokens
    return torch.stack([x.abs().sum(0), x.sum(0), x.square().sum(0)])


def _sums_of_input(found: MicroBatchSums, key: tuple[int, str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.token_sums[key] = token_sums(inputs[0].detach())

    return hook


def _sums_of_output(found: MicroBatchSums, key: tuple[int, str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.token_sums[key] = token_sums(output.detach())

    return hook


def _cosine(found: MicroBatchSums, number: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else keywords["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        found.cosine_sums[number, INFLUENCE] = F.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1).sum(0)

    return hook
