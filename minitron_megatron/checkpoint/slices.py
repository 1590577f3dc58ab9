"""Which stored pieces of a tensor a region can touch, found by its place: torch compares every region with every piece.

A layer's experts, and stacked layers, are pieces of one tensor: reading E of them one by one would be E² comparisons.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import takewhile

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

Place = tuple[int, ...]
"""Offsets in the leading dimensions."""


class StoredSlices:
    """The pieces of a checkpoint's tensors by their place in the leading dimensions, sorted out once for each tensor."""

    def __init__(self) -> None:
        self._by_place: dict[tuple[str, int], dict[Place, list[ChunkStorageMetadata]]] = {}

    def around(self, key: str, entry: TensorStorageMetadata, region: ChunkStorageMetadata) -> TensorStorageMetadata:
        """The tensor's entry with the pieces that lie where the region does; with all of them where pieces are wider than one place."""
        ahead = len(list(takewhile(lambda size: size == 1, region.sizes)))
        if not ahead or len(entry.chunks) == 1:
            return entry
        if (key, ahead) not in self._by_place:
            self._by_place[key, ahead] = _sorted_out(entry.chunks, ahead)
        by_place = self._by_place[key, ahead]
        return replace(entry, chunks=by_place[tuple(region.offsets[:ahead])]) if by_place else entry


def _sorted_out(pieces: list[ChunkStorageMetadata], ahead: int) -> dict[Place, list[ChunkStorageMetadata]]:
    """Empty where a piece covers several places."""
    found: dict[Place, list[ChunkStorageMetadata]] = defaultdict(list)
    for piece in pieces:
        if any(size != 1 for size in piece.sizes[:ahead]):
            return {}
        found[tuple(piece.offsets[:ahead])].append(piece)
    return found
