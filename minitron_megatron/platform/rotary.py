"""Rotary position embedding for CPU processes: sines once for all layers and micro-batches, and a rotation of three passes.

megatron's unfused function takes sines and cosines anew for the queries and for the keys of every layer, and rotates in seven passes,
each of which autograd runs backward again.

Legend: S sequence, K head channels, R those of them that are rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Rotate = Callable[..., Tensor]


class Rotation(torch.autograd.Function):
    """(x [S, …, K], cosines and sines [S, 1, 1, R]) → x with its first R channels rotated; backward rotates the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(grads[0], cos, -sin), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [S, …, K] with the pairs (i, i + R/2) of its first R channels turned by the angles of cos and sin [S, 1, 1, R], both halves alike."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotated(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    sin = sin[..., : width // 2]
    result = x * cos
    to_first, to_second = result.chunk(2, dim=-1)
    to_first.addcmul_(second, sin, value=-1)
    to_second.addcmul_(first, sin)
    return result


def make_rotate(stock: Rotate) -> Rotate:
    """megatron's _apply_rotary_pos_emb_bshd; what the fast one does not know goes to the stock one."""
    known: Any = WeakTensorKeyDictionary()  # by tensor: megatron hands the same angles to every layer

    def cosines_and_sines(freqs: Tensor, dtype: torch.dtype, mscale: float) -> tuple[Tensor, Tensor]:
        of_freqs = known.setdefault(freqs, {})
        if (dtype, mscale) not in of_freqs:
            of_freqs[dtype, mscale] = (freqs.cos() * mscale).to(dtype), (freqs.sin() * mscale).to(dtype)
        found: tuple[Tensor, Tensor] = of_freqs[dtype, mscale]
        return found

    def rotate(t: Tensor, freqs: Tensor, rotary_interleaved: bool = False, *more: Any, mscale: float = 1.0, **named: Any) -> Tensor:
        """more, named: marks of multi-latent attention, which releases of megatron-core call by other names."""
        if freqs.requires_grad or rotary_interleaved or any(more) or any(named.values()):
            return stock(t, freqs, rotary_interleaved, *more, mscale=mscale, **named)
        result: Tensor = Rotation.apply(t, *cosines_and_sines(freqs, t.dtype, mscale))
        return result

    return rotate


def angles_of_context_rank(pos_emb: Tensor, seq_dim: int, cp_group: Any) -> Tensor:
    """megatron's get_pos_emb_on_this_cp_rank, which asks for pinned memory: the angles of chunks r and 2R − 1 − r of 2R."""
    chunks, rank = pos_emb.chunk(2 * cp_group.size(), seq_dim), cp_group.rank()
    return torch.cat([chunks[rank], chunks[-1 - rank]], seq_dim)


def use_in_rope_utils(module: ModuleType) -> None:
    """megatron.core.models.common.embeddings.rope_utils, with the fast rotation and without pinned memory."""
    module.__dict__["get_pos_emb_on_this_cp_rank"] = angles_of_context_rank
    module.__dict__["_apply_rotary_pos_emb_bshd"] = make_rotate(module.__dict__["_apply_rotary_pos_emb_bshd"])
