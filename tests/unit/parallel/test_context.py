"""Which tokens a context rank has, against a list written by hand, and the way back."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from minitron_megatron.config.parallel import Parallel
from minitron_megatron.parallel.context import by_rank, in_order, part_of_rank
from minitron_megatron.parallel.layout import Layout, Place

BY_HAND = {1: [[0, 1, 2, 3, 4, 5]], 2: [[0, 1, 6, 7], [2, 3, 4, 5]], 3: [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]}
"""Ranks → tokens of each, in chunks of two (of three where there is one rank)."""


@pytest.mark.parametrize("ranks", BY_HAND)
def test_each_rank_has_a_chunk_from_the_front_and_its_mirror_from_the_back(ranks: int) -> None:
    tokens = torch.arange(sum(map(len, BY_HAND[ranks])))
    parts = [part_of_rank(tokens, 0, rank, ranks) for rank in range(ranks)]
    assert [part.tolist() for part in parts] == BY_HAND[ranks]
    of_samples = torch.stack([tokens, tokens + 100])
    for rank, part in enumerate(parts):
        assert torch.equal(part_of_rank(of_samples, 1, rank, ranks), torch.stack([part, part + 100]))


@pytest.mark.parametrize("ranks", BY_HAND)
def test_the_parts_of_all_ranks_come_back_in_order(ranks: int) -> None:
    whole_S2 = torch.arange(24).view(12, 2)
    assert torch.equal(in_order(by_rank(whole_S2, ranks)), whole_S2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_angles_are_those_of_the_ranks_tokens(ranks: int) -> None:
    """megatron cuts its table of angles; the tokens are cut by us."""
    angles = torch.rand(6 * ranks, 1, 1, 8)
    for rank in range(ranks):
        group: Any = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        assert torch.equal(rope_utils.get_pos_emb_on_this_cp_rank(angles, 0, group), part_of_rank(angles, 0, rank, ranks))


def test_places_and_ranks_of_a_layout_belong_to_each_other() -> None:
    groups: Any = None
    layout = Layout(2, 2, 3, False, "cost", groups, context=2)
    in_order_of_ranks = [Place(tensor, data, stage, context) for stage, data, context, tensor in product(range(2), range(3), range(2), range(2))]
    assert [layout.place_of(rank) for rank in range(24)] == in_order_of_ranks
    assert [layout.rank_of(place) for place in in_order_of_ranks] == list(range(24))


def test_outside_training_context_ranks_are_data_parallel_ranks() -> None:
    parallel = Parallel(tensor=2, context=4, data=3)
    assert parallel.processes == parallel.without_context().processes == 24
    assert (parallel.without_context().context, parallel.without_context().data) == (1, 12)
