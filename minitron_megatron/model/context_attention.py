"""Causal attention of a rank that has part of a sequence: keys and values come from all context ranks, queries are its own.

Transformer Engine has its own way, a ring, in 16 bits; this one needs torch alone.

Legend: S sequence, s = S / R this rank's part of it, c = s / 2 one of its two chunks, B batch, h this rank's query heads, g its key/value groups,
K head channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from minitron_megatron.parallel.context import chunks_of_rank, gather_sequence


def context_attention(query_sBhK: Tensor, key_sBgK: Tensor, value_sBgK: Tensor, scale: float, group: dist.ProcessGroup) -> Tensor:
    """[s, B, h·K]; each chunk of queries sees all keys up to itself."""
    groups = key_sBgK.shape[2]
    # keys and values in one collective
    both_BgSK = gather_sequence(torch.cat([key_sBgK, value_sBgK], dim=2), group).permute(1, 2, 0, 3)
    key_BgSK, value_BgSK = both_BgSK[:, :groups], both_BgSK[:, groups:]
    chunks = zip(query_sBhK.chunk(2), chunks_of_rank(group.rank(), group.size()), strict=True)
    return torch.cat([_chunk_attention(query_cBhK, number, key_BgSK, value_BgSK, scale) for query_cBhK, number in chunks])


def _chunk_attention(query_cBhK: Tensor, number: int, key_BgSK: Tensor, value_BgSK: Tensor, scale: float) -> Tensor:
    """[c, B, h·K]; number: of the chunk in the whole sequence."""
    width = query_cBhK.shape[0]
    seen = (number + 1) * width
    visible_cS = torch.ones(width, seen, dtype=torch.bool, device=query_cBhK.device).tril(number * width)
    grouped = query_cBhK.shape[2] != key_BgSK.shape[1]
    result_BhcK = F.scaled_dot_product_attention(
        query_cBhK.permute(1, 2, 0, 3), key_BgSK[:, :, :seen], value_BgSK[:, :, :seen], visible_cS, scale=scale, enable_gqa=grouped
    )
    return result_BhcK.permute(2, 0, 1, 3).flatten(2)
