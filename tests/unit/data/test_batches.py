"""Batches, and which samples a rank takes."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.data.batches import collate, step_sample_ids
from minitron_megatron.errors import DataError


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_takes_each_of_its_samples_once_over_all_ranks(data_size: int, micro_batch: int) -> None:
    for step in range(3):
        taken = [
            sample_id
            for rank in range(data_size)
            for batch in step_sample_ids(step, global_batch=8, micro_batch=micro_batch, data_rank=rank, data_size=data_size)
            for sample_id in batch
        ]
        assert sorted(taken) == list(range(step * 8, step * 8 + 8))


def test_micro_batches_go_round_the_ranks() -> None:
    ids = step_sample_ids(1, global_batch=8, micro_batch=2, data_rank=1, data_size=2)
    assert ids == [[10, 11], [14, 15]]


def test_a_global_batch_that_does_not_divide_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"global_batch=6 is not divisible .* = 4"):
        step_sample_ids(0, global_batch=6, micro_batch=2, data_rank=0, data_size=2)


def test_labels_are_the_next_tokens_and_every_label_counts() -> None:
    dataset = torch.arange(40).view(4, 10)
    batch = collate(dataset, [2, 0]).to("cpu")
    assert torch.equal(batch.tokens_BS, dataset[[2, 0], :-1])
    assert torch.equal(batch.labels_BS, dataset[[2, 0], 1:])
    assert batch.loss_mask_BS.dtype == torch.float32 and batch.loss_mask_BS.sum() == 18
    assert torch.equal(batch.position_ids_BS[1], torch.arange(9))
    assert batch.sample_ids_B.tolist() == [2, 0]
    assert batch.tokens_BS.is_contiguous() and batch.labels_BS.is_contiguous()
