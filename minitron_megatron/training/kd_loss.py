"""The KD loss fused with the output layer: chunk by chunk, so that no [tokens, vocabulary] tensor outlives a chunk.

Legend: n tokens of a chunk, N of a micro-batch, v this rank's rows of the vocabulary, D student's hidden, E teacher's hidden.
Gradients of the hidden states and an fp32 gradient of the weight are computed in forward, while the chunk's logits exist, and
delivered only in backward, multiplied by the incoming gradient: the schedule scales the loss after forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.training.losses.chunk import UnderWay, begin, finish
from minitron_megatron.training.losses.logits import Chunk, Logits
from minitron_megatron.training.losses.memory import tokens_of_a_chunk
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


class Gradients(NamedTuple):
    """Of the sum of losses."""

    hidden_ND: Tensor
    weight_vD: Tensor
    """fp32, padded rows at 0."""


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
        gradients = Gradients(torch.zeros_like(hidden_ND), buffer.take(weight_vD)) if needs_grad else None
        batch = _MicroBatch(hidden_ND, weight_vD, labels, targets, settings, rows, Shard(group.rank() * weight_vD.shape[0], group), gradients)
        sums = batch.run()
        grad_hidden, grad_weight = gradients or (None, None)
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


@dataclass
class _MicroBatch:
    """One pass over a micro-batch, chunk by chunk."""

    hidden_ND: Tensor
    weight_vD: Tensor
    labels: TokenLabels
    targets: Sequence[Target]
    settings: LossSettings
    rows: int
    shard: Shard
    gradients: Gradients | None

    @property
    def live(self) -> list[WeightedTarget]:
        """Teachers whose logits are made."""
        return [target for target in self.targets if isinstance(target, WeightedTarget)]

    @property
    def stored(self) -> list[StoredTarget]:
        return [target for target in self.targets if not isinstance(target, WeightedTarget)]

    def run(self) -> Tensor:
        """[losses] sums of settings.names.

        With several ranks a chunk's numbers travel while the next one's logits are computed, so that two are in memory; they are
        finished in order, with the same result to the bit.
        """
        sums = torch.zeros(len(self.settings.names), device=self.hidden_ND.device)
        in_flight = chunks_in_flight(self.shard.group)
        size = self._chunk_tokens(in_flight)
        spaces = [self._space(size) for _ in range(in_flight)]
        under_way: deque[tuple[slice, UnderWay]] = deque()
        for number, start in enumerate(range(0, self.hidden_ND.shape[0], size)):
            tokens = slice(start, min(start + size, self.hidden_ND.shape[0]))
            under_way.append((tokens, begin(self._chunk(tokens, spaces[number % len(spaces)]), self.settings, self.shard)))
            if len(under_way) == len(spaces):
                sums += self._finish(*under_way.popleft())
        while under_way:
            sums += self._finish(*under_way.popleft())
        return sums

    def _chunk_tokens(self, in_flight: int) -> int:
        # a teacher may be in another precision
        rows, of_a_logit = self.weight_vD.shape[0], max(weight.element_size() for weight in (self.weight_vD, *(x.weight_vE for x in self.live)))
        teachers, device = len(self.live), self.hidden_ND.device
        return tokens_of_a_chunk(self.settings, rows=rows, bytes_of_a_logit=of_a_logit, teachers=teachers, in_flight=in_flight, device=device)

    def _space(self, tokens: int) -> Logits:
        """For the logits of a chunk; fresh pages for each chunk would cost as much as a pass over it."""
        shape = (min(tokens, self.hidden_ND.shape[0]), self.rows)
        return Logits(self.weight_vD.new_empty(shape), tuple(target.weight_vE.new_empty(shape) for target in self.live))

    def _chunk(self, tokens: slice, space: Logits) -> Chunk:
        """The logits of both models."""
        logits = space.of(slice(0, tokens.stop - tokens.start))
        torch.mm(self.hidden_ND[tokens], self.weight_vD[: self.rows].t(), out=logits.student_nv)
        for target, teacher_nv in zip(self.live, logits.teachers_nv, strict=True):
            torch.mm(target.hidden_NE[tokens], target.weight_vE[: self.rows].t(), out=teacher_nv)
        stored = tuple(target.of_tokens(tokens) for target in self.stored)
        return Chunk(logits, self.labels.labels_N[tokens], self.labels.token_weights_N[tokens], stored)

    def _finish(self, tokens: slice, under_way: UnderWay) -> Tensor:
        """The chunk's losses; its gradients are added."""
        shares = [target.weight for target in self.live]
        sums = finish(under_way, shares, self.settings, self.shard, needs_grad=self.gradients is not None)
        if self.gradients is not None:
            grad_nv = under_way.chunk.logits.student_nv
            torch.mm(grad_nv, self.weight_vD[: self.rows], out=self.gradients.hidden_ND[tokens])
            _add_product(self.gradients.weight_vD[: self.rows], grad_nv, self.hidden_ND[tokens])
        return sums


def chunks_in_flight(group: dist.ProcessGroup) -> int:
    """Two where there is something to wait for."""
    return 1 if group.size() == 1 else 2


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
        return grad_weight.to(weight.dtype, copy=True)
    weight.main_grad.add_(grad_weight)
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)
