"""What a distillation step is measured against: plain megatron models under megatron's own schedules, nothing of our training in them.

Legend: B samples of a micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.distill import Distill, Training
from minitron_megatron.data.batches import Batch
from minitron_megatron.model.build import mark_shards, transformer_config
from minitron_megatron.model.gpt import HiddenStateGPT, StageModel
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.split import EndWork
from minitron_megatron.platform import Platform
from minitron_megatron.training.optimizer import make_optimizer

LossFunction = Callable[[Batch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class PlainGPT(HiddenStateGPT):
    """megatron's GPTModel as it is: its own output layer and loss; only how it is built is shared with ours."""

    _postprocess = GPTModel._postprocess


def plain_model(arch: Architecture, layout: Layout, platform: Platform, checkpoint: Any, ends: EndWork) -> StageModel:
    """This process's part in fp32, its layers dealt out by the same rule as ours."""
    config = transformer_config(arch, layout, platform, torch.float32, ends=ends)
    chunks = [PlainGPT(arch, layout, config, ColumnParallelLinear, stage).to(platform.device) for stage in range(layout.virtual)]
    for chunk in chunks:
        mark_shards(chunk)
    model = StageModel(arch, layout, chunks)
    load_model(model, checkpoint)
    return model


def schedule(model: StageModel, chunks: list[nn.Module], step: Any, batches: list[Batch], **arguments: Any) -> list[Any]:
    """megatron's schedule for this layout, over the batches."""
    iterators: list[Iterator[Batch]] = [iter(batches) for _ in chunks]
    samples, sequence = batches[0].tokens_BS.shape
    groups = model.layout.groups
    if model.layout.pipeline > 1:
        arguments["p2p_communicator"] = P2PCommunicator(groups.pp, model.config)
    run = get_forward_backward_func(model.layout.pipeline, model.layout.virtual if len(chunks) > 1 else None)
    return run(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=sequence,
        micro_batch_size=samples,
        pg_collection=groups,
        **arguments,
    )


@dataclass
class TeacherAlone:
    """Forward with the output layer: the logits of a micro-batch exist, and are dropped."""

    model: StageModel

    @torch.no_grad()
    def step(self, batches: list[Batch]) -> None:
        def forward(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            # labels: without them megatron would copy the logits into another order
            return chunk(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS), lambda output, non_loss_data=True: None

        schedule(self.model, list(self.model.chunks), forward, batches, forward_only=True, collect_non_loss_data=True)

    @classmethod
    def of(cls, model: StageModel) -> TeacherAlone:
        """As ModelOpt's teacher: the labels make no loss."""
        for chunk in model.frozen().chunks:
            chunk.compute_language_model_loss = lambda labels, logits: torch.zeros_like(labels, dtype=logits.dtype)
        return cls(model)


@dataclass
class Trained:
    """A student with megatron's gradients and optimizer, under a loss of a micro-batch."""

    model: StageModel
    wrapped: list[Any]
    optimizer: MegatronOptimizer
    loss: LossFunction
    schedule_arguments: dict[str, Any]

    def step(self, batches: list[Batch]) -> list[dict[str, Tensor]]:
        """What the loss logged of each micro-batch, on the last stage."""

        def forward(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output = chunk(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
            return output, lambda losses_BS: self.loss(batch, losses_BS)

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        logged = schedule(self.model, self.wrapped, forward, batches, forward_only=False, **self.schedule_arguments)
        self.optimizer.step()
        return logged


def trained(model: StageModel, settings: Distill, loss: LossFunction, **schedule_arguments: Any) -> Trained:
    wrapped, optimizer = make_optimizer(model.chunks, settings, Training())
    model.train()
    return Trained(model, wrapped, optimizer, loss, schedule_arguments)


def cross_entropy(batch: Batch, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = (losses_BS.float() * batch.loss_mask_BS).sum()
    return total, batch.loss_mask_BS.sum().int(), {"loss": total.detach().clone()}
