"""Runs micro-batches through a model's pipeline: forward only, or forward and backward.

Legend: S sequence, B samples of a micro-batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor, nn

from minitron_megatron.data.batches import Batch, MicroBatches, filler, of_context_rank, of_data_rank
from minitron_megatron.errors import LayoutError
from minitron_megatron.model.experts import same_number_of_passes
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.parallel.layout import Layout

BeforeChunk = Callable[[int, Batch], None]
"""Called with the number of this process's chunk and the micro-batch, ahead of the micro-batch's forward pass through the chunk."""
LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(hidden states, batch) → (sum of weighted token losses, integer token count, detached values for the log)."""


class Turn(NamedTuple):
    """A micro-batch on its way through one chunk."""

    chunk: int
    position: int
    batch: Batch


def batches_of_rank(groups: MicroBatches, load: Callable[[tuple[int, ...]], Batch], layout: Layout) -> list[Batch]:
    """This process's part of a global batch: its micro-batches, of each sample the tokens of its context rank. load: sample ids → whole batch."""
    mine = of_data_rank(groups, layout.data_rank, layout.data)
    return [of_context_rank(load(ids), layout.context_rank, layout.context) for ids in mine]


@torch.no_grad()
def forward_only(
    model: StageModel,
    batches: list[Batch],
    *,
    consume: Callable[[Tensor, Batch], Any] | None = None,
    before: BeforeChunk | None = None,
    after: Callable[[Batch], None] | None = None,
    arguments: Callable[[Batch], dict[str, Any]] | None = None,
) -> list[Any]:
    """Sends every micro-batch through the pipeline; what consume makes of the final hidden states, in order, on the last stage.

    consume: (hidden [S, B, D], batch) → anything; default: the hidden states. before, after: called for every micro-batch that goes
    through a chunk of this process. arguments: more of the chunk's forward, for a micro-batch (generation's cache).
    Ranks that share experts with ranks of more micro-batches, and interleaved schedules, run batches of sample id −1 behind their own, for
    which neither consume nor arguments is called. Returns an empty list on the other stages.
    """
    whole = same_number_of_passes(batches, model.layout, next(model.parameters()).device)
    whole = [*whole, *(filler(batch) for batch in whole[-1:] * _missing(model, len(whole)))]

    def step(iterator: Iterator[Turn], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        number, position, batch = next(iterator)
        if before:
            before(number, batch)
        more = arguments(batch) if arguments and position < len(batches) else {}
        hidden = chunk(batch.tokens_BS, batch.position_ids_BS, None, **more)
        if after:
            after(batch)
        if position >= len(batches):
            return hidden, lambda output, non_loss_data=True: None
        return hidden, lambda output, non_loss_data=True: consume(output, batch) if consume else output.detach()

    if not whole:
        return []
    return _schedule(model, model.chunks)(step, whole, forward_only=True, collect_non_loss_data=True)[: len(batches)]


def forward_backward(
    model: StageModel,
    wrapped: list[nn.Module],
    batches: list[Batch],
    loss: LossFunction,
    *,
    before: BeforeChunk | None = None,
) -> list[dict[str, Tensor]]:
    """One step's micro-batches forward and backward; gradients lie in the wrapped (data-parallel) chunks afterwards.

    Returns the logged values of each micro-batch on the last stage, an empty list on the others.
    """
    if _missing(model, len(batches)):
        raise LayoutError(
            f"a virtual pipeline on {model.layout.pipeline} stages needs a multiple of {model.layout.pipeline} micro-batches a step, "
            f"but there are {len(batches)}; choose distill.global_batch accordingly, or parallel.virtual=1"
        )

    def step(iterator: Iterator[Turn], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        number, _, batch = next(iterator)
        if before:
            before(number, batch)
        return chunk(batch.tokens_BS, batch.position_ids_BS, None), lambda hidden: loss(hidden, batch)

    return _schedule(model, wrapped)(step, batches, forward_only=False)


def _missing(model: StageModel, micro_batches: int) -> int:
    """How many micro-batches the interleaved schedule wants beyond these: it takes them in groups of the pipeline's size."""
    return -micro_batches % model.layout.pipeline if model.layout.virtual > 1 else 0


def _schedule(model: StageModel, chunks: Sequence[nn.Module]) -> Callable[..., list[Any]]:
    """megatron's schedule for the model's own groups: never the global ones by default."""
    groups = model.layout.groups
    if model.layout.pipeline == 1:
        return partial(_call, forward_backward_no_pipelining, chunks, model.layout.context, pg_collection=groups)
    communicator = P2PCommunicator(groups.pp, model.config)
    schedule = forward_backward_pipelining_with_interleaving if len(chunks) > 1 else forward_backward_pipelining_without_interleaving
    return partial(_call, schedule, chunks, model.layout.context, pg_collection=groups, p2p_communicator=communicator)


def _call(
    schedule: Callable[..., list[Any]], chunks: Sequence[nn.Module], context: int, step: Any, batches: list[Batch], **arguments: Any
) -> list[Any]:
    """Every chunk draws each batch once. context: ranks that share a sequence, of which the batches have a part; megatron wants the whole length."""
    iterators: Any = [iter([Turn(number, position, batch) for position, batch in enumerate(batches)]) for number in range(len(chunks))]
    samples, sequence = batches[0].tokens_BS.shape
    return schedule(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=sequence * context,
        micro_batch_size=samples,
        **arguments,
    )
