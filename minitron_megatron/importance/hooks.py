"""Forward hooks that collect token sums of one micro-batch; they do not communicate, reduce or score.

What is scored (P1 section 2.2): a head by its output before the projection, and by what that adds to the layer's sum behind it; an FFN
neuron by the input of the second matrix and by the first one's output; an embedding channel by the outputs of both norms of every layer and
of the final one; a layer by Block Influence (P2 section 2.2). Which of it ranks is chosen after the pass: scores/units.py.

Legend: S this rank's tokens of a sample, B samples, C this rank's units, D hidden, h this rank's query heads, f its neurons.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minitron_megatron.config.importance import KeptSums
from minitron_megatron.importance.experts import ExpertSums, hook_experts, is_sparse
from minitron_megatron.importance.token_sums import absolute_sums, cosine_sums, head_norm_sums, token_norms, token_sums
from minitron_megatron.model.normed import See, attention_norm, mlp_norm, on_state
from minitron_megatron.scores.statistics import FINAL_NORM, INFLUENCE


class MicroBatchSums:
    """What the hooks saw of one micro-batch: key (global layer, axis) → Σ|x|, Σx, Σx² [3, B, C], or Σ|x| alone [1, B, C]; and the cosines."""

    def __init__(self, kept: KeptSums = "all") -> None:
        self.kept = kept
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
def collecting(layers: Iterable[Any], final_norm: nn.Module | None = None, *, kept: KeptSums = "all") -> Iterator[MicroBatchSums]:
    """Hooks on these layers, all that this process holds, while the context is open; final_norm: behind the last of them, on the last stage.

    kept "default": only what the default ranking reads, and of it only Σ|x|.
    """
    found, held, norms = MicroBatchSums(kept), list(layers), _Norms()
    handles = [handle for layer in held for handle in _hook_layer(layer, found, norms)]
    if final_norm is not None and kept == "all":
        handles.append(on_state(final_norm, _sums_of_state(found, (held[-1].layer_number - 1, FINAL_NORM))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook_layer(layer: Any, found: MicroBatchSums, norms: _Norms) -> list[Any]:
    number = layer.layer_number - 1  # megatron counts from 1
    return [
        *_hook_mlp(layer.mlp, number, found),
        _hook_heads(layer, number, found),
        on_state(attention_norm(layer), _sums_of_state(found, (number, "attention_norm"))),
        on_state(mlp_norm(layer), _sums_of_state(found, (number, "mlp_norm"))),
        layer.register_forward_hook(_cosine(found, number, norms), with_kwargs=True),
    ]


def _hook_heads(layer: Any, number: int, found: MicroBatchSums) -> Any:
    projection = layer.self_attention.linear_proj
    if found.kept == "default":
        return projection.register_forward_pre_hook(_sums_of_input(found, (number, "heads")))
    return projection.register_forward_pre_hook(_sums_of_heads(found, number, projections(projection.weight, layer.config.kv_channels)))


def _hook_mlp(mlp: Any, number: int, found: MicroBatchSums) -> list[Any]:
    if not is_sparse(mlp):
        before = _sums_before_activation(found, (number, "ffn_before_activation"), gated=mlp.config.gated_linear_unit)
        return [
            *([mlp.linear_fc1.register_forward_hook(before)] if found.kept == "all" else []),
            mlp.linear_fc2.register_forward_pre_hook(_sums_of_input(found, (number, "ffn"))),
        ]
    found.experts[number] = ExpertSums(mlp.token_dispatcher, mlp.experts.num_local_experts)
    return hook_experts(mlp, found.experts[number], lambda: found.sample_ids_B)


def _sums(x_SBC: Tensor, found: MicroBatchSums) -> Tensor:
    return token_sums(x_SBC) if found.kept == "all" else absolute_sums(x_SBC)


def _sums_of_input(found: MicroBatchSums, key: tuple[int, str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.token_sums[key] = _sums(inputs[0].detach(), found)

    return hook


def projections(weight_DC: Tensor, head_channels: int) -> Tensor:
    """[h, K', K] fp32 triangles R of W = Q·R for each head's part of the projection: |W·x| = |R·x|, K' = min(K, D) rows in place of D."""
    weight_hDK = weight_DC.detach().float().unflatten(1, (-1, head_channels)).movedim(1, 0)
    return torch.linalg.qr(weight_hDK, mode="r").R


def _sums_of_heads(found: MicroBatchSums, number: int, projections_hJK: Tensor) -> Callable[..., None]:
    """By channel, and of each head's L2 norm at each token before and behind its part of the projection; tensor ranks hold whole heads."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        context_SBC = inputs[0].detach()
        found.token_sums[number, "heads"] = token_sums(context_SBC)
        norms, contributions = head_norm_sums(context_SBC, projections_hJK)
        found.token_sums[number, "head_norms"], found.token_sums[number, "head_contributions"] = norms, contributions

    return hook


def _sums_before_activation(found: MicroBatchSums, key: tuple[int, str], *, gated: bool) -> Callable[..., None]:
    """Of a gated FFN the first half, whose activation is the gate: each tensor rank holds its gates, then the values that they go with."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        product_SBf, bias_f = output  # megatron leaves the bias to whoever applies the activation
        product_SBf = product_SBf.detach() if bias_f is None else product_SBf.detach() + bias_f.detach()
        found.token_sums[key] = token_sums(product_SBf.chunk(2, dim=-1)[0] if gated else product_SBf)

    return hook


def _sums_of_state(found: MicroBatchSums, key: tuple[int, str]) -> See:
    def see(state: Callable[[], Tensor], handed_on: Tensor) -> None:
        found.token_sums[key] = _sums(state().detach(), found)

    return see


class _Norms:
    """Of the states between layers: a layer's input is the output of the one before, whose norms are known."""

    def __init__(self) -> None:
        self._of: Callable[[], Tensor | None] = lambda: None
        self._norms_SB = torch.empty(0)

    def __call__(self, x_SBD: Tensor) -> Tensor:
        if self._of() is not x_SBD:
            # weakly: a state lives no longer for being measured
            self._of, self._norms_SB = weakref.ref(x_SBD), token_norms(x_SBD.detach())
        return self._norms_SB


def _cosine(found: MicroBatchSums, number: int, norms: _Norms) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else keywords["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        found.cosine_sums[number, INFLUENCE] = cosine_sums(before.detach(), after.detach(), norms(before), norms(after))

    return hook
