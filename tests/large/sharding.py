"""Whether the parts that all ranks hold make up a checkpoint's tensors: every element once. Nothing here is megatron's or the product's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import NamedTuple

from .ranks import Owned, Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size."""


class Whole(NamedTuple):
    """A tensor of a checkpoint."""

    kind: str
    shape: tuple[int, ...]
    copies: int
    """Ranks that hold each of its elements."""


def faults(shards: Iterable[Shard], expected: Mapping[str, Whole]) -> list[str]:
    """What is wrong with the shards of all ranks, in words; nothing where those that are written tile every expected tensor."""
    by_key: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        by_key[shard.key].append(shard)
    found = [f"{key}: unknown" for key in by_key.keys() - expected.keys()]
    found += [f"{key}: on no rank" for key in expected.keys() - by_key.keys()]
    for key in by_key.keys() & expected.keys():
        found += [f"{key}: {fault}" for fault in _faults_of(by_key[key], expected[key])]
    return sorted(found)


def _faults_of(shards: Sequence[Shard], whole: Whole) -> list[str]:
    found = [f"is {kind} of {shape}, not {whole}" for kind, shape in {(shard.kind, shard.shape) for shard in shards} - {whole[:2]}]
    written = Counter(box_of(shard) for shard in shards if not any(shard.replica))
    held = Counter(box_of(shard) for shard in shards)
    found += [f"{box} is written {times} times" for box, times in written.items() if times > 1]
    found += tiling_faults(list(written), whole.shape)
    found += [f"{box} is held and not written" for box in held.keys() - written.keys()]
    found += [f"{box} is held by {times} ranks, not by {whole.copies}" for box, times in held.items() if times != whole.copies]
    names = Counter((box_of(shard), shard.replica) for shard in shards)
    found += [f"{box} has {times} copies of the name {replica}" for (box, replica), times in names.items() if times > 1]
    return found


def box_of(shard: Shard) -> Box:
    return shard.offset, shard.size


def tiling_faults(boxes: Sequence[Box], shape: tuple[int, ...]) -> list[str]:
    """Boxes that lie inside, no two of which overlap, and whose elements are as many as the tensor's, cover it once."""
    found = [f"{box} sticks out of {shape}" for box in boxes if any(a + n > size for a, n, size in zip(*box, shape, strict=True))]
    found += [f"{one} and {other} overlap" for one, other in combinations(boxes, 2) if overlap(one, other)]
    elements = sum(prod(size) for _, size in boxes)
    return found if elements == prod(shape) else [*found, f"{elements} of {prod(shape)} elements"]


def overlap(one: Box, other: Box) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))


def ownership_faults(owned: Sequence[Sequence[Owned]]) -> list[str]:
    """owned: of each data-parallel rank of a group. Every weight's elements belong to exactly one of them."""
    found = []
    for weights in zip(*owned, strict=True):
        (name,), (elements,) = {part.weight for part in weights}, {part.elements for part in weights}
        reached = 0
        for part in sorted(weights, key=lambda part: (part.start, part.stop)):
            if part.stop > part.start:
                if part.start != reached:
                    found.append(f"{name}: {'nobody has' if part.start > reached else 'two have'} what begins at {min(part.start, reached)}")
                reached = part.stop
        if reached != elements:
            found.append(f"{name}: {reached} of {elements} elements")
    return found
