"""Losses between hidden states on any pipeline stage: they enter backward where the student's state arises.

Legend: S this rank's tokens of a sample, B samples of a micro-batch, D student's hidden, E teacher's hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minitron_megatron.distill.hidden.map import StateName, Term
from minitron_megatron.distill.hidden.states import state_modules
from minitron_megatron.model.gpt import HiddenStateGPT
from minitron_megatron.model.normed import See, on_state

Kind = Literal["cosine", "mse"]


def summed_loss(projected_SBE: Tensor, teacher_SBE: Tensor, token_weights_SB: Tensor, kind: Kind) -> Tensor:
    """[] fp32: sum over tokens of weight × (1 − cosine), or of weight × mean over channels of the squared difference."""
    ours, theirs = projected_SBE.float(), teacher_SBE.float()
    losses_SB = 1 - F.cosine_similarity(ours, theirs, dim=-1) if kind == "cosine" else (ours - theirs).square().mean(-1)
    return (losses_SB * token_weights_SB).sum()


class InjectLoss(torch.autograd.Function):
    """Identity of a tensor that hands a loss its gradient when backward comes by, as megatron's MoE auxiliary loss does."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        """state as it is, or what was computed from it; loss: []; scale: [] the loss's gradient.

        Returned as itself the tensor would become a view, which megatron refuses.
        """
        ctx.save_for_backward(scale)
        return state.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale.clone(), None


class _Expected(NamedTuple):
    """What one micro-batch is held against at one module."""

    teacher_SBE: list[Tensor]
    token_weights_SB: Tensor


class HiddenLosses:
    """The hidden-state losses of one chunk of the student; hooks on the modules whose outputs are compared.

    Outside `training` and `measuring` nothing is computed or kept. The sums are over this rank's tokens and are not averaged: the gradient of
    everything is divided by the global number of tokens (calculate_per_token_loss).
    """

    def __init__(self, chunk: HiddenStateGPT, terms: Sequence[Term], kind: Kind, alpha: Callable[[], Tensor], *, stage_number: int = 0) -> None:
        """chunk: not yet wrapped, with its projections (projection.add_projections). terms: of the whole run; alpha: the loss's weight, [] fp32.

        stage_number: which (virtual) stage of the whole model the chunk is.
        """
        self.stage_number = stage_number
        self._chunk, self._terms, self._kind, self._alpha = chunk, terms, kind, alpha
        self._mode: Literal["off", "training", "measuring"] = "off"
        # without sequence parallelism every tensor rank has all tokens: one speaks
        self._speaks = bool(chunk.config.sequence_parallel) or chunk.layout.tensor_rank == 0
        self._sums = self._zeros()
        self._queues: dict[StateName, deque[_Expected]] = {}
        self._handles = []
        for name, module in state_modules(chunk).items():
            if any(term.student == name for term in terms):
                self._queues[name] = deque()
                self._handles.append(on_state(module, self._see(name)))

    @property
    def teacher_states(self) -> list[StateName]:
        """Names of the teacher's states that `expect` wants on this chunk."""
        return list(dict.fromkeys(term.teacher for term in self._terms if term.student in self._queues))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Losses are injected into backward. Under activation recompute the first run of a layer, without gradients, is passed over."""
        yield from self._during("training")

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Losses are summed in forward-only runs, nothing is injected."""
        yield from self._during("measuring")

    def expect(self, states: Mapping[StateName, Tensor], token_weights_BS: Tensor) -> None:
        """What the next micro-batch through this chunk is held against; call it ahead of each forward.

        states: the teacher's, [S, B, E] with the student's own tokens (its part of S under sequence parallelism).
        token_weights_BS: of the whole sequence; this rank's part is taken here.
        """
        if self._mode == "off":
            return
        weights_SB = token_weights_BS.t()
        if self._chunk.config.sequence_parallel:
            weights_SB = weights_SB.chunk(self._chunk.layout.tensor)[self._chunk.layout.tensor_rank]
        for name, queue in self._queues.items():
            queue.append(_Expected([states[term.teacher] for _, term in self._terms_at(name)], weights_SB))

    def take_sums(self) -> Tensor:
        """[terms] fp64: summed losses since the last call, zero for terms on other chunks.

        Added over all chunks and processes of the student they are the sums over all tokens: each token is in them once, under sequence
        parallelism (each tensor rank its part) and without it (tensor rank 0 speaks for all).
        """
        sums, self._sums = self._sums, self._zeros()
        return sums if self._speaks else torch.zeros_like(sums)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._terms), dtype=torch.float64, device=next(self._chunk.parameters()).device)

    def _terms_at(self, name: StateName) -> list[tuple[int, Term]]:
        return [(number, term) for number, term in enumerate(self._terms) if term.student == name]

    def _during(self, mode: Literal["training", "measuring"]) -> Iterator[None]:
        self._mode = mode
        try:
            yield
            left = sum(len(queue) for queue in self._queues.values())
            if left:
                raise RuntimeError(f"hidden losses: {left} states were expected and never compared; a micro-batch did not come by while {mode}")
        finally:
            self._mode = "off"
            for queue in self._queues.values():
                queue.clear()

    def _see(self, name: StateName) -> See:
        terms, queue = self._terms_at(name), self._queues[name]

        def see(state: Callable[[], Tensor], handed_on: Tensor) -> Tensor | None:
            if self._mode == "off" or (self._mode == "training" and not torch.is_grad_enabled()):
                return None
            # first in, first out: micro-batches are recomputed in the order in which they went forward
            loss = self._compare(state(), terms, queue.popleft())
            return InjectLoss.apply(handed_on, loss, self._alpha()) if self._mode == "training" else None

        return see

    def _compare(self, state_SBD: Tensor, terms: list[tuple[int, Term]], expected: _Expected) -> Tensor:
        """[] the losses of all terms at one module; each is added to the sums."""
        total = state_SBD.new_zeros((), dtype=torch.float32)
        for (number, term), teacher_SBE in zip(terms, expected.teacher_SBE, strict=True):
            projected_SBE = self._chunk.distillation_projections[term.projection](state_SBD)
            # recomputed in backward: the fp32 copies of both states would be the largest activations of the layer
            loss = checkpoint(
                summed_loss,
                projected_SBE,
                teacher_SBE,
                expected.token_weights_SB,
                self._kind,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            self._sums[number] += loss.detach()
            total = total + loss
        return total
