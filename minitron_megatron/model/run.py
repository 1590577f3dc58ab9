"""Runs micro-batches through a model's pipeline: forward only, or forward and backward.

Legend: S sequence, B samples of a micro-batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor, nn

from minitron_megatron.data.batches import Batch
from minitron_megatron.model.gpt import HiddenStateGPT

LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(hidden states, batch) → (sum of weighted token losses, integer token count, detached values for the log)."""


@torch.no_grad()
def forward_only(
    model: HiddenStateGPT,
    batches: list[Batch],
    *,
    consume: Callable[[Tensor, Batch], Any] | None = None,
    before: Callable[[Batch], None] | None = None,
) -> list[Any]:
    """Sends every micro-batch through the pipeline; what consume makes of the final hidden states, in order, on the last stage.

    consume: (hidden [S, B, D], batch) → anything; default: the hidden states. before: called on every stage ahead of a micro-batch.
    Returns an empty list on the other stages.
    """

    def step(iterator: Iterable[Batch], stage: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iter(iterator))
        if before:
            before(batch)
        hidden = stage(batch.tokens_BS, batch.position_ids_BS, None)
        return hidden, lambda output, non_loss_data=True: consume(output, batch) if consume else output.detach()

    if not batches:
        return []
    return _schedule(model, model)(step, iter(batches), forward_only=True, collect_non_loss_data=True, **_sizes(batches))


def forward_backward(
    model: HiddenStateGPT, wrapped: nn.Module, batches: list[Batch], loss: LossFunction, *, before: Callable[[Batch], None] | None = None
) -> list[dict[str, Tensor]]:
    """One step's micro-batches forward and backward; gradients lie in the wrapped (data-parallel) model afterwards.

    before: called on every stage ahead of a micro-batch's forward.
    Returns the logged values of each micro-batch on the last stage, an empty list on the others.
    """

    def step(iterator: Iterable[Batch], stage: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iter(iterator))
        if before:
            before(batch)
        return stage(batch.tokens_BS, batch.position_ids_BS, None), lambda hidden: loss(hidden, batch)

    return _schedule(model, wrapped)(step, iter(batches), forward_only=False, **_sizes(batches))


def _schedule(model: HiddenStateGPT, wrapped: nn.Module) -> Callable[..., list[Any]]:
    """megatron's schedule for the model's own groups: never the global ones by default."""
    groups = model.layout.groups
    if model.layout.pipeline == 1:
        return partial(_call, forward_backward_no_pipelining, wrapped, pg_collection=groups)
    communicator = P2PCommunicator(groups.pp, model.config)
    return partial(_call, forward_backward_pipelining_without_interleaving, wrapped, pg_collection=groups, p2p_communicator=communicator)


def _call(schedule: Callable[..., list[Any]], model: nn.Module, step: Any, iterator: Any, **arguments: Any) -> list[Any]:
    return schedule(forward_step_func=step, data_iterator=iterator, model=[model], **arguments)


def _sizes(batches: list[Batch]) -> dict[str, int]:
    samples, sequence = batches[0].tokens_BS.shape
    return {"num_microbatches": len(batches), "seq_length": sequence, "micro_batch_size": samples}
