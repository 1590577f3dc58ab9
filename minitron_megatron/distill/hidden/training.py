"""The hidden-state losses of a run: what they ask of the teacher, their weight, and their sums, over this process's chunks.

Legend: S sequence, s the student's own part of it, B samples of a micro-batch, E teacher's hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from minitron_megatron.config.distill import HiddenLoss
from minitron_megatron.data.batches import Batch
from minitron_megatron.distill.hidden.loss import HiddenLosses
from minitron_megatron.distill.hidden.map import Term, hidden_terms, layer_pairs, projection_holders, stage_of
from minitron_megatron.distill.hidden.projection import add_projections, shared_projection_group, sum_shared_projection_grads
from minitron_megatron.distill.teacher import TeacherStates, Wanted
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.training.balance import LossBalance


@dataclass
class HiddenTraining:
    """Of the student on this process."""

    terms: list[Term]
    losses: list[HiddenLosses]
    """One for each chunk."""
    balance: LossBalance
    wanted: list[Wanted]
    """The same on every process, so that all know what travels where."""
    shared: dist.ProcessGroup | None

    @contextmanager
    def training(self) -> Iterator[None]:
        """Losses enter backward."""
        with ExitStack() as stack:
            for losses in self.losses:
                stack.enter_context(losses.training())
            yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Losses are summed only."""
        with ExitStack() as stack:
            for losses in self.losses:
                stack.enter_context(losses.measuring())
            yield

    def expect(self, teacher: TeacherStates, chunk: int, batch: Batch) -> None:
        """Hands a chunk what its next micro-batch is held against."""
        losses = self.losses[chunk]
        stage = losses.stage_number
        states = {name: teacher.own_part(Wanted(name, stage), batch) for name in losses.teacher_states}
        losses.expect(states, batch.loss_mask_BS)

    def take_sums(self) -> Tensor:
        """[terms] fp64, over this process's tokens since the last call; added over all processes each token is in them once."""
        first, *others = (losses.take_sums() for losses in self.losses)
        return sum(others, start=first)

    def sum_shared_gradients(self, wrapped: Sequence[nn.Module]) -> None:
        """After megatron's own reductions of a step."""
        sum_shared_projection_grads(wrapped, self.shared)


def add_hidden_losses(
    model: StageModel, settings: HiddenLoss, *, teacher_layers: int, teacher_hidden: int, kept_layers: Sequence[int], channels: Sequence[int] | None
) -> HiddenTraining:
    """Projections and hooks on a student that is loaded and not yet wrapped; every process calls this, because a group is made.

    kept_layers, channels: of the plan, the source layer of each student layer and the source channel of each of its channels.
    """
    split = model.layers_per_stage()
    terms = hidden_terms(settings, layer_pairs(settings, teacher_layers, model.architecture.layers, kept_layers))
    balance = LossBalance(settings.weight, next(model.parameters()).device)
    losses = []
    for number, chunk in enumerate(model.chunks):
        stage = model.stage_number(number)
        add_projections(chunk, terms, layers_per_chunk=split, number=stage, teacher_hidden=teacher_hidden, channels=channels)
        losses.append(HiddenLosses(chunk, terms, settings.kind, lambda: balance.alpha, stage_number=stage))
    holders = projection_holders(terms, split).get("shared", [])
    wanted = list(dict.fromkeys(Wanted(term.teacher, stage_of(term.student, split)) for term in terms))
    return HiddenTraining(terms, losses, balance, wanted, shared_projection_group(holders, model.layout))
