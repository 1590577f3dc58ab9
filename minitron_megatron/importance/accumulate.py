"""Accumulators: per-sample aggregates, squared and summed in fp64; no communication here.

Legend: B samples of a micro-batch, C units. Samples are kept in blocks of BLOCK consecutive ids: a block is summed in the
order of its samples by the one rank that owns it, and blocks are added in order, so that the sums have the same bits for
every number of data-parallel ranks and wherever a pass was interrupted.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from minitron_megatron.data.batches import FILLING
from minitron_megatron.scores.statistics import Key

BLOCK = 16


class BlockSums:
    """Σ a and Σ a² over the samples of each block, fp64: block → key (global layer, axis) → [3, 2, C], influence [2]."""

    def __init__(self) -> None:
        self.blocks: dict[int, dict[Key, Tensor]] = {}

    def add(self, key: Key, token_sums_3BC: Tensor, tokens: int, sample_ids: list[int]) -> None:
        """Squares come after the tokens and before the samples: batch=L2 of sequence=mean is not linear (P1 section 2.2).

        token_sums_3BC: Σ|x|, Σx, Σx² over all tokens of each sample, already complete over sequence-parallel ranks.
        """
        aggregates_3BC = aggregate_tokens(token_sums_3BC.double(), tokens)
        moments_32BC = torch.stack([aggregates_3BC, aggregates_3BC.square()], dim=1)
        self._add(key, moments_32BC.movedim(2, 0), sample_ids)

    def add_influence(self, key: Key, cosine_sums_B: Tensor, tokens: int, sample_ids: list[int]) -> None:
        """For Block Influence (P2 section 2.2); cosine_sums_B: Σ over all tokens of each sample of cos(input, output) of a layer or block."""
        means_B = cosine_sums_B.double() / tokens
        self._add(key, torch.stack([means_B, means_B.square()], dim=-1), sample_ids)

    def _add(self, key: Key, of_samples: Tensor, sample_ids: list[int]) -> None:
        for value, sample in zip(of_samples, sample_ids, strict=True):
            if sample == FILLING:
                continue
            sums = self.blocks.setdefault(sample // BLOCK, {})
            sums[key] = sums[key] + value if key in sums else value.clone()


def aggregate_tokens(token_sums_3BC: Tensor, tokens: int) -> Tensor:
    """[3, B, C] mean |x|, L2 norm and variance over a sample's tokens (P1 section 2.2), out of Σ|x|, Σx, Σx²."""
    absolute, plain, squares = token_sums_3BC
    variance = (squares / tokens - (plain / tokens).square()).clamp_min(0)
    return torch.stack([absolute / tokens, squares.sqrt(), variance])


def segments(samples: range, save_every: int, data_size: int) -> list[range]:
    """Consecutive parts between two saves: whole blocks, as many for each data-parallel rank, at least save_every samples."""
    blocks = -(-save_every // (BLOCK * data_size)) * data_size
    later = range((samples.start // BLOCK + blocks) * BLOCK, samples.stop, blocks * BLOCK)
    return [range(start, stop) for start, stop in pairwise([samples.start, *later, samples.stop])]


def samples_of_rank(samples: range, data_rank: int, data_size: int, micro_batch: int) -> list[list[int]]:
    """Micro-batches of global sample ids of one data-parallel rank: whole blocks, dealt round; none crosses a block.

    All have one shape, which a pipeline's stages agree on ahead: the last one of a block is filled up.
    """
    first, behind = samples.start // BLOCK, -(-samples.stop // BLOCK)
    groups = []
    for block in range(first + data_rank, behind, data_size):
        ids = list(range(max(block * BLOCK, samples.start), min((block + 1) * BLOCK, samples.stop)))
        groups += [_filled(ids[start : start + micro_batch], micro_batch) for start in range(0, len(ids), micro_batch)]
    return groups


def _filled(ids: list[int], micro_batch: int) -> list[int]:
    return ids + [FILLING] * (micro_batch - len(ids))
