"""Accumulators: per-sample aggregates, squared and summed in fp64; no communication here.

Legend: B samples of a micro-batch, C units. Samples are kept in blocks of BLOCK consecutive ids: a block is summed in the
order of its samples by the one rank that owns it, and blocks are added in order at the end, so that the sums have the same
bits for every number of data-parallel ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_megatron.scores.statistics import INFLUENCE

BLOCK = 16


class BlockSums:
    """Σ a and Σ a² over the samples of each block, for every key (global layer, axis)."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.sums: dict[tuple[int, str], Tensor] = {}

    def add(self, key: tuple[int, str], token_sums_3BC: Tensor, tokens: int, sample_ids: list[int]) -> None:
        """token_sums_3BC: Σ|x|, Σx, Σx² over all tokens of each sample, already complete over sequence-parallel ranks."""
        aggregates_3BC = aggregate_tokens(token_sums_3BC.double(), tokens)
        moments_32BC = torch.stack([aggregates_3BC, aggregates_3BC.square()], dim=1)
        self._add(key, moments_32BC.movedim(2, 0), sample_ids)

    def add_influence(self, layer: int, cosine_sums_B: Tensor, tokens: int, sample_ids: list[int]) -> None:
        """cosine_sums_B: Σ over all tokens of each sample of cos(layer input, layer output)."""
        means_B = cosine_sums_B.double() / tokens
        self._add((layer, INFLUENCE), torch.stack([means_B, means_B.square()], dim=-1), sample_ids)

    def _add(self, key: tuple[int, str], of_samples: Tensor, sample_ids: list[int]) -> None:
        if key not in self.sums:
            self.sums[key] = of_samples.new_zeros(self.blocks, *of_samples.shape[1:])
        for value, sample in zip(of_samples, sample_ids, strict=True):
            self.sums[key][sample // BLOCK] += value


def aggregate_tokens(token_sums_3BC: Tensor, tokens: int) -> Tensor:
    """[3, B, C] mean |x|, L2 norm and variance over a sample's tokens, out of Σ|x|, Σx, Σx²."""
    absolute, plain, squares = token_sums_3BC
    variance = (squares / tokens - (plain / tokens).square()).clamp_min(0)
    return torch.stack([absolute / tokens, squares.sqrt(), variance])


def blocks_of(samples: int) -> int:
    return -(-samples // BLOCK)


def samples_of_rank(samples: int, data_rank: int, data_size: int, micro_batch: int) -> list[list[int]]:
    """Micro-batches of global sample ids of one data-parallel rank: whole blocks, dealt round; none crosses a block."""
    groups = []
    for block in range(data_rank, blocks_of(samples), data_size):
        ids = list(range(block * BLOCK, min((block + 1) * BLOCK, samples)))
        groups += [ids[start : start + micro_batch] for start in range(0, len(ids), micro_batch)]
    return groups
