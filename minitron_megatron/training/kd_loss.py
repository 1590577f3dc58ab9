"""The KD loss fused with the output layer: chunk by chunk, so that no [tokens, vocabulary] tensor outlives a chunk.

Legend: n tokens of a chunk, N of a micro-batch, v this rank's rows of the vocabulary, D student's hidden, E teacher's hidden.
Gradients of the hidden states and an fp32 gradient of the weight are computed in forward, while the chunk's logits exist, and
delivered only in backward, multiplied by the incoming gradient: the schedule scales the loss after forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.model.divergence import Divergence, divergence, log_normalisers


@dataclass(frozen=True)
class LossSettings:
    """Weights of the losses; KL is taken at the temperature and multiplied by its square (P1 section 3)."""

    forward_kl: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    chunk_tokens: int = 256


@dataclass(frozen=True)
class TeacherTarget:
    """What the student is held against on this rank."""

    hidden_NE: Tensor
    weight_vE: Tensor
    labels_N: Tensor
    token_weights_N: Tensor
    """fp32; they go into the sum, never into the token count."""


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
        target: TeacherTarget,
        settings: LossSettings,
        rows: int,
        group: dist.ProcessGroup,
        buffer: GradientBuffer,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses and, while a chunk's logits exist, the gradients that backward delivers."""
        grad_hidden = torch.empty_like(hidden_ND) if needs_grad else None
        grad_weight = buffer.take(weight_vD) if needs_grad else None
        sums = torch.zeros(2, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], settings.chunk_tokens):
            chunk = slice(start, start + settings.chunk_tokens)
            grad_nv = _chunk(sums, hidden_ND[chunk], weight_vD[:rows], target, chunk, settings, group, needs_grad)
            if grad_hidden is not None and grad_weight is not None and grad_nv is not None:
                torch.mm(grad_nv, weight_vD[:rows], out=grad_hidden[chunk])
                _add_product(grad_weight[:rows], grad_nv, hidden_ND[chunk])
        ctx.weight, ctx.grad_hidden, ctx.grad_weight, ctx.buffer = weight_vD, grad_hidden, grad_weight, buffer
        kl, cross_entropy = sums.clone().unbind()
        kl, cross_entropy = kl.clone(), cross_entropy.clone()  # no views: the schedule divides the loss in place
        ctx.mark_non_differentiable(kl, cross_entropy)
        return settings.forward_kl * kl + settings.cross_entropy * cross_entropy, kl, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_weight = _deliver(ctx.weight, ctx.grad_weight.mul_(scale))
        ctx.buffer.give_back(ctx.grad_weight)
        return ctx.grad_hidden.mul_(scale), grad_weight, None, None, None, None, None, None


def fused_distillation_loss(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    target: TeacherTarget,
    settings: LossSettings,
    *,
    rows: int,
    group: dist.ProcessGroup,
    buffer: GradientBuffer | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over tokens of the weighted losses, and detached: sum of T²·KL(teacher ‖ student), sum of cross-entropies; in nats.

    rows: real rows of this rank's shard, the padded ones behind them are left out. The hidden states must be the same on
    every tensor rank (gathered under sequence parallelism), their gradient is this rank's part of the sum.
    """
    # asked here: inside forward gradients are always off, and ctx.needs_input_grad says True under no_grad as well
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_vD.requires_grad)
    return FusedDistillationLoss.apply(hidden_ND, weight_vD, target, settings, rows, group, buffer or GradientBuffer(), needs_grad)


def _chunk(
    sums: Tensor,
    hidden_nD: Tensor,
    weight_vD: Tensor,
    target: TeacherTarget,
    chunk: slice,
    settings: LossSettings,
    group: dist.ProcessGroup,
    needs_grad: bool,
) -> Tensor | None:
    """Adds the chunk's losses to sums; returns the gradient of its raw logits [n, v] in the weight's type."""
    raw_nv = (hidden_nD @ weight_vD.t()).float()
    student_nv = raw_nv / settings.temperature if settings.temperature != 1 else raw_nv
    teacher_nv = (target.hidden_NE[chunk] @ target.weight_vE[: weight_vD.shape[0]].t()).float().div_(settings.temperature)
    labels, token_weights = target.labels_N[chunk], target.token_weights_N[chunk]
    first_row = group.rank() * target.weight_vE.shape[0]
    found = divergence(student_nv, teacher_nv, labels, first_row=first_row, group=group)
    raw_log_norm = found.student_log_norm_n if settings.temperature == 1 else log_normalisers(raw_nv, group)
    label_logit = found.label_logit_n * settings.temperature
    squared = settings.temperature**2
    sums += torch.stack([(squared * found.forward_kl_n * token_weights).sum(), ((raw_log_norm - label_logit) * token_weights).sum()])
    if not needs_grad:
        return None
    gradient_nv = _kl_gradient(student_nv, teacher_nv, found).mul_(settings.forward_kl * settings.temperature)
    if settings.cross_entropy:
        gradient_nv += _cross_entropy_gradient(raw_nv, raw_log_norm, labels - first_row).mul_(settings.cross_entropy)
    return gradient_nv.mul_(token_weights[:, None]).to(weight_vD.dtype)


def _kl_gradient(student_nv: Tensor, teacher_nv: Tensor, found: Divergence) -> Tensor:
    """softmax(student) − softmax(teacher); the teacher's logits are used up."""
    gradient = (student_nv - found.student_log_norm_n[:, None]).exp_()
    return gradient.sub_(teacher_nv.sub_(found.teacher_log_norm_n[:, None]).exp_())


def _cross_entropy_gradient(raw_nv: Tensor, log_norm_n: Tensor, row_n: Tensor) -> Tensor:
    """softmax − one-hot of the labels that lie in this shard."""
    gradient = (raw_nv - log_norm_n[:, None]).exp_()
    inside = (row_n >= 0) & (row_n < raw_nv.shape[-1])
    tokens = inside.nonzero()[:, 0]
    gradient[tokens, row_n[tokens]] -= 1
    return gradient


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
