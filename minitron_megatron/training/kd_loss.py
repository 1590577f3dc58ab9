"""The KD loss fused with the output layer: chunk by chunk, so that no [tokens, vocabulary] tensor outlives a chunk.

Legend: n tokens of a chunk, N of a micro-batch, v this rank's rows of the vocabulary, D student's hidden, E teacher's hidden.
Gradients of the hidden states and an fp32 gradient of the weight are computed in forward, while the chunk's logits exist, and
delivered only in backward, multiplied by the incoming gradient: the schedule scales the loss after forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.training.losses.chunk import chunk_losses
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import StoredTarget, Target, TokenLabels, WeightedTarget
from minitron_megatron.training.losses.terms import Shard


class GradientBuffer:
    """One fp32 [v, D] buffer, used again by every micro-batch, because a fresh one of this size costs page faults each time."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._taken = False

    def take(self, like: Tensor) -> Tensor:
        if self._taken:  # a second micro-batch in flight has its own
            return torch.zeros_like(like, dtype=torch.float32)
        if self._buffer is None or self._buffer.shape != like.shape:
            self._buffer = torch.empty_like(like, dtype=torch.float32)
        self._taken = True
        return self._buffer.zero_()

    def give_back(self, buffer: Tensor) -> None:
        self._taken = self._taken and buffer is not self._buffer


class FusedDistillationLoss(torch.autograd.Function):
    """(hidden [N, D], weight [v, D]) → sum of weighted token losses; see fused_distillation_loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_vD: Tensor,
        labels: TokenLabels,
        targets: Sequence[Target],
        settings: LossSettings,
        rows: int,
        group: dist.ProcessGroup,
        buffer: GradientBuffer,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """The losses and, while a chunk's logits exist, the gradients that backward delivers."""
        grad_hidden = torch.zeros_like(hidden_ND) if needs_grad else None  # zeros: every weight may be 0 at this step
        grad_weight = buffer.take(weight_vD) if needs_grad else None
        sums = torch.zeros(len(settings.names), device=hidden_ND.device)
        shard = Shard(group.rank() * weight_vD.shape[0], group)
        for start in range(0, hidden_ND.shape[0], settings.chunk_tokens):
            chunk = slice(start, start + settings.chunk_tokens)
            of_chunk = TokenLabels(labels.labels_N[chunk], labels.token_weights_N[chunk])
            parts = [target.of_chunk(chunk, rows) for target in targets]
            grad_nv = _chunk(sums, hidden_ND[chunk], weight_vD[:rows], of_chunk, parts, settings, shard, needs_grad)
            if grad_hidden is not None and grad_weight is not None and grad_nv is not None:
                torch.mm(grad_nv, weight_vD[:rows], out=grad_hidden[chunk])
                _add_product(grad_weight[:rows], grad_nv, hidden_ND[chunk])
        ctx.weight, ctx.grad_hidden, ctx.grad_weight, ctx.buffer = weight_vD, grad_hidden, grad_weight, buffer
        ctx.mark_non_differentiable(sums)
        return settings.total(dict(zip(settings.names, sums.clone().unbind(), strict=True))).clone(), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_weight = _deliver(ctx.weight, ctx.grad_weight.mul_(scale))
        ctx.buffer.give_back(ctx.grad_weight)
        return ctx.grad_hidden.mul_(scale), grad_weight, *[None] * 7


def fused_distillation_loss(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    labels: TokenLabels,
    targets: Sequence[Target],
    settings: LossSettings,
    *,
    rows: int,
    group: dist.ProcessGroup,
    buffer: GradientBuffer | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of the weighted losses, and detached each loss's own sum by settings.names; in nats.

    targets: none where settings.has_teacher is False; with several each loss against the teachers is their weighted sum, see WeightedTarget.
    rows: real rows of this rank's shard, the padded ones behind them are left out. The hidden states must be the same on
    every tensor rank (gathered under sequence parallelism), their gradient is this rank's part of the sum.
    """
    if settings.has_teacher != bool(targets):
        raise ValueError(f"{len(targets)} teachers, while the settings say has_teacher={settings.has_teacher}")
    # asked here: inside forward gradients are always off, and ctx.needs_input_grad says True under no_grad as well
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_vD.requires_grad)
    own_buffer = buffer or GradientBuffer()
    total, sums = FusedDistillationLoss.apply(hidden_ND, weight_vD, labels, targets, settings, rows, group, own_buffer, needs_grad)
    # no views: the schedule divides the loss in place
    return total, {name: value.clone() for name, value in zip(settings.names, sums.unbind(), strict=True)}


def _chunk(
    sums: Tensor,
    hidden_nD: Tensor,
    weight_vD: Tensor,
    labels: TokenLabels,
    targets: Sequence[Target],
    settings: LossSettings,
    shard: Shard,
    needs_grad: bool,
) -> Tensor | None:
    """Adds the chunk's losses to sums; returns the gradient of its raw logits [n, v] in the weight's type."""
    raw_nv = (hidden_nD @ weight_vD.t()).float()
    live, stored = [target for target in targets if isinstance(target, WeightedTarget)], _stored(targets)
    teachers = (((target.hidden_NE @ target.weight_vE.t()).float().div_(settings.temperature), target.weight) for target in live)
    values, gradient_nv = chunk_losses(raw_nv, labels.labels_N, teachers, settings, shard, needs_grad=needs_grad, stored=stored)
    sums += torch.stack([(values[name] * labels.token_weights_N).sum() for name in settings.names])
    return None if gradient_nv is None else gradient_nv.mul_(labels.token_weights_N[:, None]).to(weight_vD.dtype)


def _stored(targets: Sequence[Target]) -> list[StoredTarget]:
    return [target for target in targets if not isinstance(target, WeightedTarget)]


def _add_product(grad_weight_vD: Tensor, grad_nv: Tensor, hidden_nD: Tensor) -> None:
    """grad_weight += gradᵀ · hidden, accumulated in fp32 over the chunks."""
    if grad_nv.dtype == torch.float32:
        grad_weight_vD.addmm_(grad_nv.t(), hidden_nD)
    else:
        grad_weight_vD += grad_nv.t() @ hidden_nD


def _deliver(weight: Any, grad_weight: Tensor) -> Tensor:
    """Into DDP's fp32 main_grad where there is one, with the dummy gradient that its hooks wait for; else as it is.

    None instead of the dummy would break overlap_grad_reduce, whose hooks fire on the parameter's gradient.
    """
    if getattr(weight, "main_grad", None) is None:
        return grad_weight.to(weight.dtype).clone()
    weight.main_grad.add_(grad_weight)
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)
