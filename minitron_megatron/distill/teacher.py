"""The frozen teacher's side of a step: its forward-only schedule for the whole global batch, ahead of the student's.

It is never pulled from inside the student's schedule: ranks of one teacher group stand at different student micro-batches
there, and would wait for each other for ever.

Legend: S sequence, or the part of it that this context rank has, s this rank's part of that, B samples of a micro-batch, N tokens of a
micro-batch, v this rank's rows of the vocabulary, E teacher's hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.data.batches import Batch, MicroBatches, of_context_rank
from minitron_megatron.distill.exchange import Exchange, Route, StateShape
from minitron_megatron.distill.handover import HandoverStore, Held
from minitron_megatron.distill.hidden.map import StateName, stage_of
from minitron_megatron.distill.hidden.states import StateCapture
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel, padded_vocab
from minitron_megatron.model.run import batches_of_rank, forward_only
from minitron_megatron.parallel.collectives import gather_first
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.platform import Platform
from minitron_megatron.training.losses.target import WeightedTarget

FINAL: StateName = ("final",)
"""The last hidden states, behind the final norm."""


class Wanted(NamedTuple):
    """A state of the teacher and the student's (virtual) stage that is held against it."""

    state: StateName
    stage: int


@dataclass
class Teacher:
    """The frozen model in its own layout, and its output weight where the student's loss is made."""

    model: StageModel
    student: Layout
    output_weight_vE: Tensor | None
    """On the student's last stage, in the student's partition of the vocabulary; the model itself builds none."""
    exchange: Exchange
    budget_bytes: float
    platform: Platform
    weight: float = 1.0
    """Of its losses in the sum over teachers."""
    capture: StateCapture | None = None
    """Of the inner states that hidden-state losses compare."""

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def take_weights(self, checkpoint: Path) -> None:
        """Replaces the weights in place by those of a checkpoint of the same architecture; every process calls this."""
        load_model(self.model, checkpoint)
        weight = self.output_weight_vE
        if weight is not None and not _is_part_of(self.model, weight):
            source = MegatronSource(checkpoint, self.architecture)
            weight.copy_(output_weight(source, self.model, self.student, weight.dtype))

    def listen(self, wanted: Iterable[Wanted]) -> None:
        """Hooks on the states that hidden-state losses will ask for."""
        self.capture = StateCapture(self.model.chunks, [item.state for item in wanted])

    def states(self, groups: MicroBatches, load: Callable[[tuple[int, ...]], Batch], wanted: Sequence[Wanted] = ()) -> TeacherStates:
        """Runs all micro-batches of a global batch and brings their states to the student's ranks; every process calls this.

        load: sample ids → batch on the device. wanted: inner states, the same on every process; the final ones always come.
        """
        layout, stores = self.model.layout, [HandoverStore(self.budget_bytes, self.platform.device) for _ in range(2)]
        made, arrived = stores
        last = Wanted(FINAL, self.student.pipeline * self.student.virtual - 1)

        def hold(hidden_sBE: Tensor, batch: Batch) -> None:
            made.put((last, ids_of(batch)), Held(hidden_sBE.detach(), layout.sequence_parallel))

        def hold_inner(batch: Batch) -> None:
            found = self.capture.take() if self.capture else {}
            for item in wanted:
                if item.state in found:
                    made.put((item, ids_of(batch)), Held(found[item.state], layout.sequence_parallel))

        batches = batches_of_rank(groups, load, layout)
        forward_only(self.model, batches, consume=hold, after=hold_inner)
        if groups:
            # a rank without any has to know the shape of those that it does not run
            shaped = batches[0] if batches else of_context_rank(load(groups[0]), layout.context_rank, layout.context)
            self.exchange.run([self._route(item) for item in (last, *wanted)], groups, made, arrived, self._shape(shaped))
        return TeacherStates(self, arrived)

    def _route(self, wanted: Wanted) -> Route:
        source = self.model.layout.pipeline - 1 if wanted.state == FINAL else stage_of(wanted.state, self.model.layers_per_stage())
        return Route(wanted, source, wanted.stage % self.student.pipeline)

    def _shape(self, batch: Batch) -> StateShape:
        samples, sequence = batch.tokens_BS.shape
        return StateShape(sequence, samples, self.model.config.hidden_size, self.model.config.params_dtype)


class TeacherStates:
    """The teacher's states of one global batch on this rank, found by the sample ids of a micro-batch."""

    def __init__(self, teacher: Teacher, held: HandoverStore) -> None:
        self._teacher, self._held = teacher, held
        self._last = Wanted(FINAL, teacher.student.pipeline * teacher.student.virtual - 1)

    def targets(self, batch: Batch) -> list[WeightedTarget]:
        """What the student of this micro-batch is held against; the states are handed out once and forgotten."""
        if self._teacher.output_weight_vE is None:
            raise RuntimeError("the teacher's output weight is only on the student's last stage")
        hidden_NE = self.whole(self._last, batch).flatten(0, 1)
        return [WeightedTarget(hidden_NE, self._teacher.output_weight_vE, self._teacher.weight)]

    def whole(self, wanted: Wanted, batch: Batch) -> Tensor:
        """[S, B, E] on every tensor rank of the student."""
        held = self._held.take((wanted, ids_of(batch)))
        if not held.sharded:
            return held.states
        gathered = gather_first(held.states, self._teacher.student.groups.tp)
        return gathered.flatten(0, 1)[: batch.tokens_BS.shape[1]]

    def own_part(self, wanted: Wanted, batch: Batch) -> Tensor:
        """[s, B, E] the part of the sequence that this rank's student works on: all of it without sequence parallelism."""
        student = self._teacher.student
        if not student.sequence_parallel:
            return self.whole(wanted, batch)
        held = self._held.take((wanted, ids_of(batch)))
        return held.states if held.sharded else held.states.chunk(student.tensor)[student.tensor_rank]


def ids_of(batch: Batch) -> tuple[int, ...]:
    return tuple(batch.sample_ids_B.tolist())


def _is_part_of(model: StageModel, weight: Tensor) -> bool:
    return any(weight is parameter for parameter in model.parameters())  # FP8 weights have no address of their own


def load_teacher(
    source: MegatronSource,
    checkpoint: Path,
    layout: Layout,
    student: Layout,
    platform: Platform,
    dtype: torch.dtype,
    *,
    budget_bytes: float,
    share: float = 1.0,
    fp8: ModelFp8 | None = None,
) -> Teacher:
    """Builds and fills the teacher; share: its weight among several, fp8: how it computes in FP8.

    Every process calls this, because a group for the exchange is made.
    """
    model = build_model(source.arch, layout, platform, dtype, output_layer=None, fp8=fp8)
    load_model(model, checkpoint)
    group = dist.new_group(timeout=student.timeout)
    weight = output_weight(source, model, student, dtype) if student.is_last_stage else None
    return Teacher(model, student, weight, Exchange(layout, student, group, platform.device), budget_bytes, platform, share)


def output_weight(source: MegatronSource, teacher: StageModel, student: Layout, dtype: torch.dtype) -> Tensor:
    """[v, E] the teacher's output weight in the student's partition and padding of the vocabulary, read once from its checkpoint.

    Tied embeddings that this rank holds in the same partition are shared, not copied.
    """
    first, layout = teacher.chunks[0], teacher.layout
    same_part = (layout.tensor, layout.tensor_rank) == (student.tensor, student.tensor_rank)
    if source.arch.tied_embeddings and first.pre_process and same_part:
        return first.embedding.word_embeddings.weight
    row = [row for row in tensor_table(source.arch) if row.axes == ("V", "D")][-1]  # the embeddings' where they are tied
    rows = padded_vocab(source.arch.vocab, student.tensor) // student.tensor
    start = student.tensor_rank * rows
    weight = torch.zeros(rows, source.arch.hidden, dtype=dtype, device=next(teacher.parameters()).device)
    real = range(start, min(start + rows, source.arch.vocab))
    if real:
        weight[: len(real)] = source.read(row, real)
    return weight
