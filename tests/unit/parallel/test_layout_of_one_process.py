"""A layout of one process: its groups, and that it can be made anew; several processes are in tests/distributed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from minitron_megatron.errors import LayoutError
from minitron_megatron.parallel.collectives import gather_first, sum_over
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.world import World


def test_one_process_is_first_and_last_in_everything(layout: Layout, world: World) -> None:
    assert (layout.tensor_rank, layout.stage, layout.data_rank) == (0, 0, 0)
    assert layout.is_first_stage and layout.is_last_stage and world.is_main
    assert layout.describe() == "tensor 1 × pipeline 1 × data 1"
    assert world.from_main({"a": 1}) == {"a": 1}


def test_a_layout_can_be_made_anew_in_the_same_process(make_layout: Callable[..., Layout]) -> None:
    first = make_layout()
    assert make_layout(layers_per_stage="even").groups.tp is not first.groups.tp


def test_sizes_that_are_not_the_number_of_processes_are_refused_with_the_mend(make_layout: Callable[..., Layout]) -> None:
    with pytest.raises(LayoutError, match=r"= 6 processes, but 1 were started; set parallel\.data=1 or start 6"):
        make_layout(tensor=2, pipeline=3)


def test_collectives_over_one_rank_give_a_new_tensor_and_leave_theirs(layout: Layout) -> None:
    x = torch.arange(6.0).view(2, 3)
    total, gathered = sum_over(x, layout.groups.tp), gather_first(x, layout.groups.tp)
    assert torch.equal(total, x)
    assert torch.equal(gathered, x[None])
    total += 1
    gathered += 1
    assert torch.equal(x, torch.arange(6.0).view(2, 3))
