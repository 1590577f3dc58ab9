"""Which samples a rank measures and when it saves: every sample once, whole blocks, equal work; dummies count for nothing."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.data.batches import FILLING
from minitron_megatron.importance.accumulate import BLOCK, BlockSums, samples_of_rank, segments
from minitron_megatron.importance.reduce import Part, _join, fold


@pytest.mark.parametrize("samples", [range(0, 35), range(16, 64), range(5, 6), range(10, 100), range(0, 1024)])
@pytest.mark.parametrize("save_every", [1, 16, 17, 64, 5000])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 5, 16])
def test_every_sample_is_measured_once_in_whole_blocks(samples: range, save_every: int, ranks: int, micro_batch: int) -> None:
    seen, owners = [], {}
    for segment in segments(samples, save_every, ranks):
        for rank in range(ranks):
            for filled in samples_of_rank(segment, rank, ranks, micro_batch):
                assert len(filled) == micro_batch
                ids = [sample for sample in filled if sample != FILLING]
                assert len({sample // BLOCK for sample in ids}) == 1
                assert owners.setdefault(ids[0] // BLOCK, (segment, rank)) == (segment, rank)  # a block is one rank's, before one save
                seen += ids
    assert sorted(seen) == list(samples)


def test_a_segment_has_as_many_blocks_for_each_rank_and_at_least_what_was_asked() -> None:
    assert segments(range(0, 100), 17, 1) == [range(0, 32), range(32, 64), range(64, 96), range(96, 100)]
    assert segments(range(0, 100), 1, 2) == [range(0, 32), range(32, 64), range(64, 96), range(96, 100)]
    assert segments(range(0, 300), 65, 3) == [range(0, 96), range(96, 192), range(192, 288), range(288, 300)]
    assert segments(range(20, 60), 16, 1) == [range(20, 32), range(32, 48), range(48, 60)]  # from then on at the edges of blocks
    assert segments(range(0, 10), 64, 4) == [range(0, 10)]
    assert [len(samples_of_rank(range(96, 192), rank, 3, 1)) for rank in range(3)] == [32, 32, 32]


def test_a_dummy_leaves_no_trace_in_the_sums() -> None:
    def add(sums: BlockSums, ids: list[int]) -> BlockSums:
        values = torch.arange(1.0, 25.0).view(3, 2, 4)[:, : len(ids)]
        sums.add({(0, "ffn"): values}, 7, ids)
        sums.add_influence({(0, "influence"): torch.tensor([3.0, 100.0])[: len(ids)]}, 7, ids)
        return sums

    plain, padded = add(BlockSums(), [5]), add(BlockSums(), [5, FILLING])
    assert padded.blocks.keys() == {0}
    assert all(torch.equal(padded.blocks[0][key], value) for key, value in plain.blocks[0].items())
    assert add(BlockSums(), [FILLING, FILLING]).blocks == {}


def test_experts_to_which_no_token_of_a_block_was_sent_count_zero_in_their_place() -> None:
    """Experts on three ranks; block 4 is the third rank's, and none of its tokens went to the second rank's experts."""

    def sums(value: float, *, owner: bool = False) -> dict[tuple[int, str], torch.Tensor]:
        return {(0, "experts"): torch.full((3, 2, 2), value), **({(0, "heads"): torch.ones(3, 2, 4)} if owner else {})}

    parts = [Part(0, 2, {4: sums(3.0, owner=True)}), Part(0, 1, {5: sums(7.0, owner=True)}), Part(0, 0, {4: sums(1.0)})]
    found = _join(parts, 3)
    assert found[4][0, "experts"][1, 1].tolist() == [1, 1, 0, 0, 3, 3]
    assert found[5][0, "experts"][1, 1].tolist() == [0, 0, 7, 7, 0, 0]
    assert found[4][0, "heads"].shape == (3, 2, 4)


def test_blocks_are_added_in_their_order_wherever_the_pass_was_cut() -> None:
    """1e16 swallows a 1 that comes alone, so every other order or grouping gives another number."""
    blocks = {number: {(0, "ffn"): torch.tensor([value], dtype=torch.float64)} for number, value in enumerate([1e16, 1.0, 1.0, -1e16])}
    whole = fold({}, dict(reversed(blocks.items())))[0, "ffn"]
    assert whole.item() == 0.0
    for cut in (1, 2, 3):
        begun = fold({}, {number: blocks[number] for number in range(cut)})
        before = {key: value.clone() for key, value in begun.items()}
        assert torch.equal(fold(begun, {number: blocks[number] for number in range(cut, 4)})[0, "ffn"], whole)
        assert torch.equal(begun[0, "ffn"], before[0, "ffn"])  # what was saved stays what it was
