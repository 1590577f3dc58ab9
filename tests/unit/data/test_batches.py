"""Batches, and which samples a rank takes."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.data.batches import collate, micro_batches, of_context_rank, of_data_rank
from minitron_megatron.errors import DataError


@pytest.mark.parametrize("data_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_global_batch_takes_each_of_its_samples_once_over_all_ranks(data_size: int, micro_batch: int) -> None:
    groups = micro_batches(16, global_batch=8, micro_batch=micro_batch)
    taken = [sample for rank in range(data_size) for ids in of_data_rank(groups, rank, data_size) for sample in ids]
    assert sorted(taken) == list(range(16, 24))


def test_micro_batches_go_round_the_ranks() -> None:
    groups = micro_batches(8, global_batch=8, micro_batch=2)
    assert of_data_rank(groups, 1, 2) == [(10, 11), (14, 15)]


def test_a_global_batch_that_does_not_divide_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"global_batch=7 is not divisible by distill\.micro_batch=2"):
        micro_batches(0, global_batch=7, micro_batch=2)


def test_labels_are_the_next_tokens_and_every_label_counts() -> None:
    dataset = torch.arange(40).view(4, 10)
    batch = collate(dataset, [2, 0]).to("cpu")
    assert torch.equal(batch.tokens_BS, dataset[[2, 0], :-1])
    assert torch.equal(batch.labels_BS, dataset[[2, 0], 1:])
    assert batch.loss_mask_BS.dtype == torch.float32 and batch.loss_mask_BS.sum() == 18
    assert torch.equal(batch.position_ids_BS[1], torch.arange(9))
    assert batch.sample_ids_B.tolist() == [2, 0]
    assert batch.tokens_BS.is_contiguous() and batch.labels_BS.is_contiguous()


def test_context_ranks_share_every_sequence_of_a_batch_out_with_all_that_belongs_to_its_tokens() -> None:
    whole = collate(torch.arange(40).view(4, 10)[:, :9], [2, 0])
    parts = [of_context_rank(whole, rank, 2) for rank in range(2)]
    assert [part.position_ids_BS[0].tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    for part in parts:
        places = part.position_ids_BS[0]
        for name in ("tokens_BS", "labels_BS", "loss_mask_BS"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, places])
        assert part.sample_ids_B.tolist() == [2, 0]
