"""What experts see of a micro-batch, sample by sample, although tokens of several samples and ranks meet in one expert.

Legend: S sequence, B samples of a micro-batch, n tokens of one expert, N of all, U samples that reached this rank's experts, e this rank's experts,
F ffn, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minitron_megatron.data.batches import FILLING


class ExpertSums:
    """Token sums of one layer's experts on this rank: each sample's tokens that were sent to an expert, the others count as zero."""

    def __init__(self, dispatcher: Any, experts: int) -> None:
        self._dispatcher = dispatcher
        self._rows: list[Tensor] = []
        """For each expert, [n] which of `samples` its tokens belong to."""
        self.samples: list[int] = []
        """[U] global ids."""
        self.tokens = 0
        """Tokens of each of them."""
        self._output_norms: list[Tensor | None] = [None] * experts
        self._inputs: list[Tensor | None] = [None] * experts

    def clear(self) -> None:
        """Nothing is known of the micro-batch any more: a layer of another chunk of the model has not seen the next one yet."""
        self.samples, self.tokens = [], 0

    def route(self, probs: Tensor, routing_map: Tensor, samples_B: Tensor, tokens: int) -> None:
        """Sends each token's sample id the way that the token will go, so that ids arrive in the order of the expert's tokens.

        A collective of the ranks that share the experts. The dispatcher sets up anew for the tokens themselves.
        """
        # a sample's length goes with it: filling on this rank may be shorter than what other ranks send
        labels_B2 = torch.stack([samples_B, torch.full_like(samples_B, tokens)], dim=-1)
        sent = self._dispatcher.dispatch_preprocess(labels_B2.expand(tokens, -1, -1).contiguous(), routing_map, probs)
        labels, per_expert, _ = self._dispatcher.dispatch_postprocess(*self._dispatcher.token_dispatch(*sent))
        self._place(labels, per_expert.tolist())

    def _place(self, labels_N2: Tensor, per_expert: list[int]) -> None:
        ids_N, lengths_N = labels_N2.T.contiguous()
        real_N = ids_N != FILLING
        samples_U = ids_N[real_N].unique()
        self.samples, self.tokens = samples_U.tolist(), int(lengths_N[real_N].max()) if real_N.any() else 0
        places_N = torch.where(real_N, torch.searchsorted(samples_U, ids_N), FILLING)
        self._rows = list(places_N.split(per_expert))

    def see_input(self, expert: int, x_nF: Tensor) -> None:
        """Input of the second matrix; megatron multiplies it with the token's router weight."""
        self._inputs[expert] = self._sums(expert, x_nF)

    def see_output(self, expert: int, y_nD: Tensor) -> None:
        """Output of the second matrix, that is of the expert times the token's router weight."""
        self._output_norms[expert] = self._sums(expert, y_nD.float().norm(dim=-1, keepdim=True))

    def _sums(self, expert: int, x_nC: Tensor) -> Tensor:
        """[3, U, C] fp32: Σ|x|, Σx, Σx² over the tokens of each sample."""
        rows_n = self._rows[expert]
        x_nC, rows_n = x_nC[rows_n != FILLING].float(), rows_n[rows_n != FILLING]
        sums_3UC = x_nC.new_zeros(3, len(self.samples), x_nC.shape[-1])
        for total_UC, values_nC in zip(sums_3UC, (x_nC.abs(), x_nC, x_nC.square()), strict=True):
            total_UC.index_add_(0, rows_n, values_nC)
        return sums_3UC

    def axes(self) -> dict[str, Tensor]:
        """Axis → [3, U, units of this rank]: one unit an expert, or F after F."""
        return {"experts": _joined(self._output_norms), "expert_ffn": _joined(self._inputs)}


def _joined(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None], dim=-1)


def is_sparse(mlp: Any) -> bool:
    """Whether a layer's MLP is a router with experts."""
    return hasattr(mlp, "router")


def hook_experts(mlp: Any, sums: ExpertSums, samples_B: Callable[[], Tensor]) -> list[Any]:
    """Hooks on a layer's router and experts; samples_B: [B] ids of the micro-batch that is under way."""

    def routed(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        sums.route(output[0].detach(), output[1], samples_B(), inputs[0].shape[0])

    return [mlp.router.register_forward_hook(routed), *_hook_second_matrices(mlp.experts, sums)]


def _hook_second_matrices(experts: Any, sums: ExpertSums) -> list[Any]:
    """Transformer Engine keeps those of all experts in one module, which is given the tokens expert after expert."""
    if not hasattr(experts, "local_experts"):
        return [experts.linear_fc2.register_forward_hook(_grouped_hook(sums))]
    handles = []
    for number, expert in enumerate(experts.local_experts):
        handles.append(expert.linear_fc2.register_forward_pre_hook(_input_hook(sums, number)))
        handles.append(expert.linear_fc2.register_forward_hook(_output_hook(sums, number)))
    return handles


def _grouped_hook(sums: ExpertSums) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, list[int]], output: tuple[Tensor, Any]) -> None:
        x_NF, per_expert = inputs
        for number, (x_nF, y_nD) in enumerate(zip(x_NF.detach().split(per_expert), output[0].detach().split(per_expert), strict=True)):
            sums.see_input(number, x_nF)
            sums.see_output(number, y_nD)

    return hook


def _input_hook(sums: ExpertSums, number: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.see_input(number, inputs[0].detach())

    return hook


def _output_hook(sums: ExpertSums, number: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        sums.see_output(number, output[0].detach())

    return hook
