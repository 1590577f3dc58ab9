"""How much of a rank's kept activations exists at one time: followed through megatron's order of passes (schedule/simulate.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from minitron_megatron.schedule.simulate import passes_of_student

ROUNDS = 3
"""Times the pipeline's stages: behind so many micro-batches the order repeats itself."""


class InFlight(NamedTuple):
    """At the moment of the largest sum."""

    bytes: int
    losses: int
    """Most micro-batches whose loss is made and not yet gone back."""


def in_flight(kept: Sequence[int], *, rank: int, ranks: int, micro_batches: int) -> InFlight:
    """kept: bytes that each chunk of the rank keeps of a micro-batch; with virtual stages ranks divides micro_batches."""
    virtual = len(kept)
    states = _alive(rank, ranks, virtual, min(micro_batches, ROUNDS * ranks * virtual))
    most = max(sum(count * size for count, size in zip(alive, kept, strict=True)) for alive in states)
    return InFlight(most, max(alive[-1] for alive in states) if rank == ranks - 1 else 0)


@lru_cache(maxsize=4096)
def _alive(rank: int, ranks: int, virtual: int, micro_batches: int) -> frozenset[tuple[int, ...]]:
    """Every state that the rank is in: of each chunk how many micro-batches have gone forward and not yet back."""
    alive = [0] * virtual
    found = set()
    for one in passes_of_student(rank, ranks, virtual, micro_batches):
        alive[one.chunk] += 1 if one.kind == "forward" else -1
        found.add(tuple(alive))
    return frozenset(found)
