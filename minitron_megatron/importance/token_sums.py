"""Sums over tokens of what the hooks see, in a few passes over an activation and with small copies of it.

An activation is gone through in blocks of rows: copies of a block stay in the processor's cache, and are the only ones. On CUDA, where a
reduction reads its input once and converts as it goes, there are no blocks and no copies.

Legend: S this rank's tokens of a sample, B samples, C units, h query heads, K head channels, J rows of a projection, R rows of a block, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vector_norm

BLOCK_BYTES = 4 << 20
"""Of a copied block in fp32. Smaller ones wake the threads more often, larger ones leave the cache."""
SMALLEST_NORM = 1e-8
"""As torch's cosine_similarity: a state of zeros is not divided by zero."""


def token_sums(x_SBC: Tensor) -> Tensor:
    """[3, B, C] fp32: Σ|x|, Σx, Σx² over tokens."""
    if x_SBC.is_cuda:
        return sums_without_blocks(x_SBC)
    total_3BC = x_SBC.new_zeros(3, *x_SBC.shape[1:], dtype=torch.float32)
    absolute_BC, plain_BC, squares_BC = total_3BC
    for x_RBC in _row_blocks(x_SBC):
        values_RBC = x_RBC.float()  # the block itself where it is fp32
        plain_BC += values_RBC.sum(0)
        copy_RBC = values_RBC.abs() if values_RBC is x_RBC else values_RBC.abs_()
        absolute_BC += copy_RBC.sum(0)
        squares_BC += copy_RBC.square_().sum(0)  # of fp32: squares of bf16 activations lose small units over many tokens
    return total_3BC


def absolute_sums(x_SBC: Tensor) -> Tensor:
    """[1, B, C] fp32: Σ|x| over tokens."""
    if x_SBC.is_cuda:
        return vector_norm(x_SBC, 1, dim=0, dtype=torch.float32)[None]
    total_BC = x_SBC.new_zeros(x_SBC.shape[1:], dtype=torch.float32)
    for x_RBC in _row_blocks(x_SBC):
        total_BC += x_RBC.abs().sum(0, dtype=torch.float32)
    return total_BC[None]


def sums_without_blocks(x_SBC: Tensor) -> Tensor:
    """The same, each sum by one reduction that converts to fp32 as it reads."""
    absolute_BC, root_BC = (vector_norm(x_SBC, order, dim=0, dtype=torch.float32) for order in (1, 2))
    return torch.stack([absolute_BC, x_SBC.sum(0, dtype=torch.float32), root_BC.square()])


def head_norm_sums(context_SBC: Tensor, projections_hJK: Tensor) -> tuple[Tensor, Tensor]:
    """Token sums [3, B, h] of each head's L2 norm at each token, before and behind its part of the projection."""
    samples, heads = context_SBC.shape[1], projections_hJK.shape[0]
    before_3Bh, behind_3Bh = context_SBC.new_zeros(2, 3, samples, heads, dtype=torch.float32)
    for context_RBC in _row_blocks(context_SBC):
        heads_hTK = context_RBC.float().flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1)  # T: a block's tokens of all samples
        for total_3Bh, vectors_hTK in ((before_3Bh, heads_hTK), (behind_3Bh, heads_hTK @ projections_hJK.mT)):
            norms_RBh = vector_norm(vectors_hTK, dim=-1).T.unflatten(0, (-1, samples))
            sums_Bh = norms_RBh.sum(0)  # no norm is negative: Σ|x| and Σx are one
            total_3Bh += torch.stack([sums_Bh, sums_Bh, norms_RBh.square().sum(0)])
    return before_3Bh, behind_3Bh


def token_norms(x_SBD: Tensor) -> Tensor:
    """[S, B] fp32 L2 norm of each token's state."""
    return vector_norm(x_SBD, dim=-1, dtype=torch.float32)


def cosine_sums(before_SBD: Tensor, after_SBD: Tensor, before_SB: Tensor, after_SB: Tensor) -> Tensor:
    """[B] fp32 Σ over tokens of the cosine between two states, given their norms [S, B]."""
    pairs = zip(_row_blocks(before_SBD), _row_blocks(after_SBD), strict=True)
    products_SB = torch.cat([(before_RBD.float() * after_RBD.float()).sum(-1) for before_RBD, after_RBD in pairs])
    return (products_SB / (before_SB.clamp_min(SMALLEST_NORM) * after_SB.clamp_min(SMALLEST_NORM))).sum(0)


def _row_blocks(x_SBC: Tensor) -> Iterator[Tensor]:
    rows = x_SBC.shape[0] if x_SBC.is_cuda else max(1, BLOCK_BYTES // (4 * x_SBC[0].numel()))
    yield from x_SBC.split(rows)
