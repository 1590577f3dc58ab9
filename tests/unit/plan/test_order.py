"""How many micro-batches a rank keeps at one time."""

from __future__ import annotations

import pytest

from minitron_megatron.plan.order import in_flight


@pytest.mark.parametrize(("rank", "micro_batches", "alive"), [(0, 8, 4), (1, 8, 3), (3, 8, 1), (0, 2, 2), (0, 1, 1), (0, 576, 4)])
def test_one_forward_one_backward_keeps_as_many_as_ranks_follow(rank: int, micro_batches: int, alive: int) -> None:
    """arXiv 2104.04473, section 2.2.1."""
    assert in_flight([10], rank=rank, ranks=4, micro_batches=micro_batches).bytes == 10 * alive


@pytest.mark.parametrize(("ranks", "virtual"), [(2, 2), (4, 2), (4, 3)])
def test_interleaving_keeps_more(ranks: int, virtual: int) -> None:
    """arXiv 2205.05198, section 4.2.3: the first rank keeps L (1 + (p − 1) / (p m)) layers of activations, m chunks of L / (p m) layers each."""
    layers = ranks * virtual
    found = in_flight([1] * virtual, rank=0, ranks=ranks, micro_batches=8 * ranks)
    assert found.bytes == pytest.approx(layers * (1 + (ranks - 1) / (ranks * virtual)))


def test_the_loss_of_one_micro_batch_waits_for_its_backward_pass() -> None:
    assert [in_flight([1], rank=rank, ranks=4, micro_batches=8).losses for rank in range(4)] == [0, 0, 0, 1]
