"""Samples → batches, and which samples a data-parallel rank takes at a step.

Legend: S sequence, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from minitron_megatron.errors import DataError
from minitron_megatron.parallel.context import part_of_rank


class TokenDataset(Protocol):
    """Samples of S + 1 tokens each, int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, sample_id: int) -> Tensor: ...


@runtime_checkable
class WeightedDataset(TokenDataset, Protocol):
    """Whose tokens do not all count alike."""

    def weights(self, sample_id: int) -> Tensor:
        """[S + 1] fp32 ≥ 0: how much each token of the sample counts as a label; the first one is none."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, or a context rank's part of its sequences; sample_ids are global, so that teacher and student can meet whatever their
    layouts."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    """fp32 ≥ 0, how much each label counts in the loss; as a token it counts where that is above 0."""
    position_ids_BS: Tensor
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)})


def label_weights(dataset: TokenDataset, sample_id: int, tokens: Tensor) -> Tensor:
    """[S + 1] fp32: 1 for every token of a dataset that has no weights of its own. tokens: the sample's."""
    return dataset.weights(sample_id) if isinstance(dataset, WeightedDataset) else torch.ones(len(tokens))


def collate(dataset: TokenDataset, sample_ids: Sequence[int]) -> Batch:
    """Stacks samples [S + 1] into a batch: labels are the tokens shifted by one, and so are their weights."""
    samples_Bs = torch.stack([dataset[sample_id] for sample_id in sample_ids])
    weights_Bs = torch.stack([label_weights(dataset, sample_id, tokens) for sample_id, tokens in zip(sample_ids, samples_Bs, strict=True)])
    tokens_BS, labels_BS = samples_Bs[:, :-1].contiguous(), samples_Bs[:, 1:].contiguous()
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        loss_mask_BS=weights_Bs[:, 1:].contiguous(),
        position_ids_BS=torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).contiguous(),
        sample_ids_B=torch.tensor(sample_ids, dtype=torch.int64),
    )


FILLING = -1
"""Sample id of what runs through a model only to keep schedules in step, and counts for nothing."""


def filler(batch: Batch) -> Batch:
    """The same shapes, counting for nothing."""
    return replace(batch, loss_mask_BS=torch.zeros_like(batch.loss_mask_BS), sample_ids_B=torch.full_like(batch.sample_ids_B, FILLING))


MicroBatches = list[tuple[int, ...]]
"""Sample ids of each micro-batch of a global batch, in order."""


def micro_batches(first_sample: int, *, global_batch: int, micro_batch: int) -> MicroBatches:
    """The global batch that begins at a sample: the same samples in the same micro-batches whatever the layout.

    Raises DataError where micro_batch does not divide the global batch.
    """
    if global_batch % micro_batch:
        raise DataError(f"distill.global_batch={global_batch} is not divisible by distill.micro_batch={micro_batch}")
    return [tuple(range(begin, begin + micro_batch)) for begin in range(first_sample, first_sample + global_batch, micro_batch)]


def of_data_rank(groups: MicroBatches, data_rank: int, data_size: int) -> MicroBatches:
    """What a data-parallel rank takes: micro-batches are dealt round."""
    return groups[data_rank::data_size]


def of_context_rank(batch: Batch, context_rank: int, context_size: int) -> Batch:
    """The tokens of every sample that a context rank takes; the samples are the same on all of them."""
    own = {item.name: part_of_rank(getattr(batch, item.name), 1, context_rank, context_size) for item in fields(batch) if item.name != "sample_ids_B"}
    return replace(batch, **own)
