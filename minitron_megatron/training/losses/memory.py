"""How many tokens a chunk has, so that its logits stay within a budget of memory."""

from __future__ import annotations

import torch

from minitron_megatron.platform.kernels import block_bytes
from minitron_megatron.training.losses.settings import LossSettings

FP32_BYTES = 4
WHOLE_CHUNK_COPIES = 8
"""fp32 intermediate results as large as a chunk's logits that exist at one time where a loss takes the chunk whole (measured: at most 7.1)."""
BLOCKS = 8
"""The same in blocks where losses go through the chunk in blocks (measured: at most 7)."""


def tokens_of_a_chunk(settings: LossSettings, *, rows: int, bytes_of_a_logit: int, teachers: int, in_flight: int, device: torch.device) -> int:
    """settings.chunk_tokens, or what settings.memory_bytes has room for; at least 1.

    rows: of this rank's shard with its padding, so that every rank gets the same. The [rows, hidden] gradient of the weight is not counted.
    Nothing here depends on what happens to be free: the chunk decides the order in which that gradient's parts are added, and a resumed run
    on the same layout must give the same bits.
    """
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    of_a_token = rows * (1 + teachers) * bytes_of_a_logit * in_flight
    room = settings.memory_bytes
    if settings.takes_chunks_whole:
        of_a_token += rows * FP32_BYTES * WHOLE_CHUNK_COPIES
    elif (block := block_bytes(device)) is not None:
        room -= BLOCKS * max(block, rows * FP32_BYTES)
    return max(1, _rounded(room // of_a_token))


def _rounded(tokens: int) -> int:
    """A multiple of 16 where there are as many: matrix products like it."""
    return tokens - tokens % 16 if tokens >= 16 else tokens
