"""Where a rank stands in a layout, as the layout says it and as it is counted by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist

from minitron_megatron.parallel.layout import Layout, Place


class Stand(NamedTuple):
    """What one rank says of a layout: its place, its number, and with whom it is together."""

    place: Place
    rank: int
    tensor: list[int]
    pipeline: list[int]
    data: list[int]


def stand_in(layout: Layout) -> Stand:
    groups = layout.groups
    return Stand(layout.place, layout.rank_of(layout.place), *map(dist.get_process_group_ranks, (groups.tp, groups.pp, groups.dp)))


def counted_by_hand(rank: int, tensor: int, data: int, pipeline: int) -> Stand:
    """Tensor is the fastest, then data, then pipeline."""
    place = Place(rank % tensor, rank // tensor % data, rank // (tensor * data))
    return Stand(
        place,
        rank,
        [other + tensor * (place.data + data * place.stage) for other in range(tensor)],
        [place.tensor + tensor * (place.data + data * other) for other in range(pipeline)],
        [place.tensor + tensor * (other + data * place.stage) for other in range(data)],
    )
