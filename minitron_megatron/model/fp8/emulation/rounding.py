"""Tensors rounded to 8-bit floating point and back, by the scaling rules of Transformer Engine 2.11.

e4m3 and e5m2: arXiv 2209.05433, section 3. A scale multiplies a tensor ahead of the cast; values beyond the largest number saturate, as
the hardware's conversion does. Legend: R rows, C columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EXPONENT_BITS = torch.tensor(0xFF800000 - (1 << 32), dtype=torch.int32)
"""Sign and exponent of an fp32 number."""


def largest(dtype: torch.dtype) -> float:
    """448 of e4m3, 57344 of e5m2."""
    return torch.finfo(dtype).max


def amax_of(x: Tensor) -> Tensor:
    """Scalar fp32: the largest magnitude; 0 where x is empty (an expert without tokens)."""
    return x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """The scale that takes amax to the largest number of a type; 1 where amax is 0 or infinite. fp32, of amax's shape.

    power_of_two: the next lower power, so that dividing by the scale rounds nothing.
    """
    scale = (largest(dtype) / amax).clamp_max(torch.finfo(torch.float32).max)
    scale = torch.where((amax == 0) | amax.isinf(), 1.0, scale)
    return _power_below(scale) if power_of_two else scale


def mx_scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale of an MX block (arXiv 2310.10537): its inverse is amax / largest, rounded up to a power of two."""
    inverse = amax * (1 / largest(dtype))
    below = _power_below(inverse)
    inverse = torch.where(inverse > below, 2 * below, below).clamp_min(2.0**-126)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, inverse.reciprocal())


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: x as it is after the cast, divided by the scale again. scale: of a shape that broadcasts with x."""
    limit = largest(dtype)
    cast = (x.float() * scale).clamp_(-limit, limit).to(dtype)
    return cast.float() * scale.reciprocal()


def block_rounded(x_RC: Tensor, dtype: torch.dtype, block: tuple[int, int], *, mx: bool = False) -> Tensor:
    """fp32 [R, C]: each block of (rows, columns) has a scale of its own, a power of two; blocks at the edges may be cut.

    mx: the scale's rule is that of the MX formats.
    """
    rows, columns = x_RC.shape
    if not x_RC.numel():
        return x_RC.float()
    height, width = block
    padding = (0, -columns % width, 0, -rows % height)
    padded = torch.nn.functional.pad(x_RC.float(), padding)
    blocks = padded.view(math.ceil(rows / height), height, math.ceil(columns / width), width)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    scale = mx_scale_of(amax, dtype) if mx else scale_of(amax, dtype, power_of_two=True)
    return rounded(blocks, scale, dtype).view(padded.shape)[:rows, :columns]


def _power_below(x: Tensor) -> Tensor:
    """The mantissa's bits are cleared: exact, where a logarithm is not."""
    return (x.float().contiguous().view(torch.int32) & EXPONENT_BITS.to(x.device)).view(torch.float32)
