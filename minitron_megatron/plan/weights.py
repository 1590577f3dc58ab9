"""The parameters of a chunk, one by one and in the order in which megatron-core registers them: its buffers are cut in that order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.plan.split import Chunk, Split


class Weight(NamedTuple):
    """One parameter, as much of it as a tensor rank holds."""

    elements: int
    on_both_ends: bool = False
    """A tied embedding that the first and the last stage both hold; megatron gives it a bucket of its own."""
    of_experts: bool = False
    """Of experts that data-parallel ranks share out: its gradient is summed over fewer ranks."""
    sides: tuple[int, int] | None = None
    """Rows and columns of a layer's matrix, which may be FP8; None: never is."""
    layer: int = -1
    """Whose it is, counted over the whole model."""


def chunk_weights(split: Split, chunk: Chunk, *, output: bool = True) -> list[Weight]:
    """output: whether the last chunk has an output layer; the teacher of a distillation has none there."""
    arch, weights = split.arch, []
    vocabulary, tied_apart = split.vocabulary_rows * arch.hidden, arch.tied_embeddings and output and split.pipeline > 1
    if chunk.is_first:
        weights.append(Weight(vocabulary, on_both_ends=tied_apart))
    for layer in chunk.layers:
        weights += [weight._replace(layer=layer) for weight in _layer_weights(split, arch.ffn_width(layer))]
    if chunk.is_last:
        weights += _norm(arch, arch.hidden)
    if chunk.is_last and output and (tied_apart or not arch.tied_embeddings):
        weights.append(Weight(vocabulary, on_both_ends=tied_apart))
    return weights


def elements(weights: list[Weight]) -> int:
    return sum(weight.elements for weight in weights)


def _layer_weights(split: Split, ffn: int) -> Iterator[Weight]:
    arch, tensor = split.arch, split.tensor
    yield from _norm(arch, arch.hidden)
    yield _matrix(arch.hidden, arch.heads * arch.head_channels // tensor)
    yield _matrix(arch.qkv_rows // tensor, arch.hidden)
    if arch.family.qkv_bias:
        yield Weight(arch.qkv_rows // tensor)
    if arch.family.qk_norm:
        yield from (Weight(arch.head_channels), Weight(arch.head_channels))
    yield from _norm(arch, arch.hidden)
    if arch.experts:
        yield Weight(arch.experts * arch.hidden)
    for _ in range(arch.experts // split.expert if arch.experts else 1):
        yield _matrix((2 if arch.family.is_gated else 1) * ffn // tensor, arch.hidden, of_experts=split.expert > 1)
        yield _matrix(arch.hidden, ffn // tensor, of_experts=split.expert > 1)


def _matrix(rows: int, columns: int, *, of_experts: bool = False) -> Weight:
    return Weight(rows * columns, of_experts=of_experts, sides=(rows, columns))


def _norm(arch: Architecture, channels: int) -> list[Weight]:
    return [Weight(channels)] * (1 if arch.family.norm == "rmsnorm" else 2)
