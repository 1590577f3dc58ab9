"""Accumulators: per-sample aggregates, squared and summed in fp64; no communication here.

Legend: B samples of a micro-batch, C units. Samples are kept in blocks of BLOCK consecutive ids: a block is summed in the
order of its samples by the one rank that owns it, and blocks are added in order, so that the sums have the same bits for
every number of data-parallel ranks and wherever a pass was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from minitron_megatron.data.batches import FILLING
from minitron_megatron.scores.statistics import Key, is_influence

BLOCK = 16


class BlockSums:
    """Σ a and Σ a² over the samples of each block, fp64, on the device that measured them; nothing here asks the device for a value."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[tuple[Key, ...], tuple[Tensor, list[int]]]] = {}
        """Block → keys that were added together → their sums side by side, and how wide each is."""

    def add(self, token_sums: Mapping[Key, Tensor], tokens: int, sample_ids: list[int]) -> None:
        """Squares come after the tokens and before the samples: batch=L2 of sequence=mean is not linear (P1 section 2.2).

        token_sums: of each key [3, B, C] Σ|x|, Σx, Σx² over all tokens of each sample, or [1, B, C] Σ|x| alone; already complete over
        sequence-parallel ranks.
        """
        aggregates_3BU = aggregate_tokens(torch.cat([*token_sums.values()], dim=-1).double(), tokens)
        moments_32BU = torch.stack([aggregates_3BU, aggregates_3BU.square()], dim=1)
        self._add(tuple(token_sums), [value.shape[-1] for value in token_sums.values()], moments_32BU.movedim(2, 0), sample_ids)

    def add_influence(self, cosine_sums: Mapping[Key, Tensor], tokens: int, sample_ids: list[int]) -> None:
        """For Block Influence (P2 section 2.2); of each key [B] Σ over all tokens of each sample of cos(input, output) of a layer or block."""
        means_Bn = torch.stack([*cosine_sums.values()], dim=-1).double() / tokens
        self._add(tuple(cosine_sums), [1] * len(cosine_sums), torch.stack([means_Bn, means_Bn.square()], dim=1), sample_ids)

    def _add(self, keys: tuple[Key, ...], widths: list[int], of_samples: Tensor, sample_ids: list[int]) -> None:
        for value, sample in zip(of_samples, sample_ids, strict=True):
            if sample == FILLING:
                continue
            sums = self._sums.setdefault(sample // BLOCK, {})
            if keys in sums:
                sums[keys][0].add_(value)
            else:
                sums[keys] = value.clone(), widths

    @property
    def blocks(self) -> dict[int, dict[Key, Tensor]]:
        """Block → key (global layer, axis) → [3, 2, C], or [1, 2, C] of mean |x| alone; influence [2]."""
        return {block: dict(_apart(sums)) for block, sums in self._sums.items()}


def _apart(sums: dict[tuple[Key, ...], tuple[Tensor, list[int]]]) -> Iterator[tuple[Key, Tensor]]:
    for keys, (values, widths) in sums.items():
        for key, value in zip(keys, values.split(widths, dim=-1), strict=True):
            yield key, value.squeeze(-1) if is_influence(key[1]) else value.contiguous()


def aggregate_tokens(token_sums_3BC: Tensor, tokens: int) -> Tensor:
    """[3, B, C] mean |x|, L2 norm and variance over a sample's tokens (P1 section 2.2), out of Σ|x|, Σx, Σx²; [1, B, C] out of Σ|x| alone."""
    if len(token_sums_3BC) == 1:
        return token_sums_3BC / tokens
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
