"""Causal attention over short sequences in bf16 on a CPU, where torch's fused kernel is slow: its backward takes three times as long as this.

Legend: S sequence, B batch, H query heads, G key/value groups, R = H / G, K head channels; P = B · G.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LONGEST = 512
"""Tokens. The probabilities that backward needs are kept: H · S · 2 bytes a token."""


def is_short(query_SBHK: Tensor, key_SBGK: Tensor) -> bool:
    """Whether short_attention is the faster one; with keys of earlier tokens it is not for it."""
    return query_SBHK.device.type == "cpu" and query_SBHK.dtype == torch.bfloat16 and query_SBHK.shape[0] == key_SBGK.shape[0] <= LONGEST


def short_attention(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, scale: float) -> Tensor:
    """[S, B, H·K]; scores and softmax are fp32."""
    result: Tensor = ShortAttention.apply(query_SBHK, key_SBGK, value_SBGK, scale)
    return result


class ShortAttention(torch.autograd.Function):
    """Scores in one batched product for all heads of a group, so that keys and values are not repeated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        groups = key.shape[2]
        query_PRsK, key_PSK, value_PSK = by_group(query, groups), by_group(key, groups), by_group(value, groups)
        hidden = future_hidden(key.shape[0], query.shape[2] // groups)
        scores = torch.baddbmm(hidden, query_PRsK.float(), key_PSK.float().transpose(1, 2), alpha=scale)
        probabilities = torch.softmax(scores, dim=-1).to(value.dtype)
        ctx.scale, ctx.groups = scale, groups
        ctx.save_for_backward(query_PRsK, key_PSK, value_PSK, probabilities)
        return by_token(torch.bmm(probabilities, value_PSK), query.shape).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, probabilities = ctx.saved_tensors
        sequence, samples, width = grads[0].shape
        channels = key.shape[-1]
        shape = torch.Size([sequence, samples, width // channels, channels])
        gradient = by_group(grads[0].view(shape), ctx.groups)
        of_value = torch.bmm(probabilities.transpose(1, 2), gradient)
        of_probabilities = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        of_group = torch.Size([sequence, samples, ctx.groups, channels])
        return by_token(of_query, shape), by_token(of_key, of_group), by_token(of_value, of_group), None


def by_group(x_SBHK: Tensor, groups: int) -> Tensor:
    """[S, B, H, K] → [B·G, R·S, K]"""
    sequence, samples, heads, channels = x_SBHK.shape
    apart = x_SBHK.reshape(sequence, samples, groups, heads // groups, channels)
    return apart.permute(1, 2, 3, 0, 4).reshape(samples * groups, -1, channels)


def by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """The way back; shape: (S, B, H, K)."""
    sequence, samples, heads, channels = shape
    return x.view(samples, heads, sequence, channels).permute(2, 0, 1, 3).reshape(shape)


@lru_cache(maxsize=8)
def future_hidden(sequence: int, repeated: int) -> Tensor:
    """[R·S, S] −∞ where a key comes after the query, else 0."""
    return torch.full((sequence, sequence), -torch.inf).triu(1).repeat(repeated, 1)
