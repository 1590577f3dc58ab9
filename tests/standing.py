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
    context: list[int]


def stand_in(layout: Layout) -> Stand:
    groups = layout.groups
    return Stand(layout.place, layout.rank_of(layout.place), *map(dist.get_process_group_ranks, (groups.tp, groups.pp, groups.dp, groups.cp)))


def counted_by_hand(rank: int, tensor: int, data: int, pipeline: int, context: int = 1) -> Stand:
    """Tensor is the fastest, then context, then data, then pipeline."""
    place = Place(rank % tensor, rank // (tensor * context) % data, rank // (tensor * context * data), rank // tensor % context)

    def number(of_tensor: int, of_context: int, of_data: int, stage: int) -> int:
        return of_tensor + tensor * of_context + tensor * context * of_data + tensor * context * data * stage

    return Stand(
        place,
        rank,
        [number(other, place.context, place.data, place.stage) for other in range(tensor)],
        [number(place.tensor, place.context, place.data, other) for other in range(pipeline)],
        [number(place.tensor, place.context, other, place.stage) for other in range(data)],
        [number(place.tensor, other, place.data, place.stage) for other in range(context)],
    )
