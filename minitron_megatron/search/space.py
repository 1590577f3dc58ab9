"""The space of a search as architectures (arXiv 2407.14679, section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import lcm
from typing import NamedTuple

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.search import Space
from minitron_megatron.errors import ArchitectureError

AXES = ("layers", "hidden", "heads", "kv_groups", "ffn", "experts")
SHORT = {"layers": "L", "hidden": "D", "heads": "H", "kv_groups": "G", "ffn": "F", "experts": "E"}


class Enumerated(NamedTuple):
    """Every combination of a space, once."""

    architectures: list[Architecture]
    impossible: int
    """Combinations that are no model, or larger than the source in some axis."""


def enumerate_space(space: Space, source: Architecture, ffn_multiple: int = 1) -> Enumerated:
    """The largest sizes first, so that of equal candidates the least cut one is met first.

    ffn_multiple: of what ffn_factor gives, beside space.alignment.
    """
    found: dict[Architecture, None] = {}
    impossible: set[tuple[int, ...]] = set()
    for sizes in _combinations(space, source, lcm(space.alignment, ffn_multiple)):
        try:
            arch = source.resized(**sizes)
        except ArchitectureError:
            impossible.add(tuple(sizes.values()))
            continue
        if any(size > getattr(source, axis) for axis, size in sizes.items()):
            impossible.add(tuple(sizes.values()))
        else:
            found[arch] = None
    return Enumerated(list(found), len(impossible))


def _combinations(space: Space, source: Architecture, ffn_multiple: int) -> Iterator[dict[str, int]]:
    axes = {axis: sorted(sizes, reverse=True) for axis, sizes in space.axes().items()}
    for sizes in product(*axes.values()):
        named = dict(zip(axes, sizes, strict=True))
        if "kv_groups" in named:
            named.setdefault("heads", source.heads_per_group * named["kv_groups"])  # a group that is kept keeps its heads
        if space.ffn_factor is None:
            yield named
            continue
        hidden = named.get("hidden", source.hidden)
        for factor in sorted(space.ffn_factor, reverse=True):
            yield {**named, "ffn": nearest_multiple(factor * hidden, ffn_multiple)}


def nearest_multiple(value: float, of: int) -> int:
    """At least one of it; halves go up."""
    return max(of, of * int(value / of + 0.5))


def name_of(arch: Architecture) -> str:
    """`L26-D576-H9-G3-F1024`: what a candidate's folder is called."""
    return "-".join(f"{SHORT[axis]}{getattr(arch, axis)}" for axis in AXES if getattr(arch, axis))


def cut_sizes(arch: Architecture, source: Architecture) -> dict[str, int]:
    """What pruning has to be told: the sizes that are not the source's, and heads beside groups, which would take theirs along."""
    cut = {axis: getattr(arch, axis) for axis in AXES if getattr(arch, axis) != getattr(source, axis)}
    return {**cut, "heads": arch.heads} if "kv_groups" in cut else cut
