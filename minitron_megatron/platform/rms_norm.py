"""RMSNorm that is fast on either device: torch's own kernel on CUDA; on a CPU, where torch composes it of small steps, fewer of them.

Legend: D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class RootMeanSquareNorm(torch.autograd.Function):
    """(x […, D], weight [D]) → x / √(mean x² + eps) · weight, computed in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x · scale and g the gradient times the weight: dx = (g − n · mean(g · n)) · scale."""
        x, weight, scale = ctx.saved_tensors
        normed, gradient = torch.mul(x, scale), grads[0].float()
        along = gradient * normed
        of_weight = along.flatten(0, -2).sum(0)
        mean = torch.mv(along.flatten(0, -2), weight.float()).div_(x.shape[-1]).view_as(scale)
        of_x = torch.mul(gradient, weight.float()).addcmul_(normed, mean, value=-1).mul_(scale)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x […, D] normed over its last dimension."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    result: Tensor = RootMeanSquareNorm.apply(x, weight, eps)
    return result
