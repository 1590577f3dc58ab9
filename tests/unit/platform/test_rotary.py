"""The fast rotary embedding against complex multiplication in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.platform.rotary import Rotation, make_rotate

SEQUENCE, SAMPLES, HEADS, CHANNELS = 12, 2, 3, 8


def angles(rotated: int) -> Tensor:
    """[S, 1, 1, R] as megatron makes them: both halves alike."""
    half = torch.outer(torch.arange(SEQUENCE).float(), 1 / 100 ** (torch.arange(0, rotated, 2).float() / rotated))
    return torch.cat([half, half], dim=-1)[:, None, None]


def turned(x: Tensor, freqs: Tensor, sign: int = 1) -> Tensor:
    """The pairs (i, i + R/2) as complex numbers, times exp(i·angle)."""
    half = freqs.shape[-1] // 2
    first, second = x[..., :half].double(), x[..., half : 2 * half].double()
    product = torch.complex(first, second) * torch.polar(torch.ones_like(freqs[..., :half]).double(), sign * freqs[..., :half].double())
    return torch.cat([product.real, product.imag, x[..., 2 * half :].double()], dim=-1)


def unreachable(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the stock function was called")


@pytest.mark.parametrize("rotated", [CHANNELS, CHANNELS // 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])  # a few roundings of values around 1
def test_values_and_gradients_are_those_of_a_complex_product(rotated: int, dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(SEQUENCE, SAMPLES, HEADS, CHANNELS + 3, generator=random).to(dtype)
    x, freqs = wide[..., :CHANNELS].detach().requires_grad_(), angles(rotated)  # a part of a wider tensor, as queries are
    gradient = torch.randn(x.shape, generator=random).to(dtype)
    y = make_rotate(unreachable)(x, freqs)
    y.backward(gradient)
    torch.testing.assert_close(y.double(), turned(x.detach(), freqs), rtol=0, atol=tolerance * 4)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), turned(gradient, freqs, sign=-1), rtol=0, atol=tolerance * 4)


def test_gradients_agree_with_differences() -> None:
    x, freqs = torch.randn(SEQUENCE, 1, 2, CHANNELS, dtype=torch.float64, requires_grad=True), angles(CHANNELS).double()
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, freqs.cos(), freqs.sin()), x)


def test_angles_that_changed_are_not_taken_for_the_old_ones() -> None:
    rotate, x = make_rotate(unreachable), torch.randn(SEQUENCE, 1, 1, CHANNELS)
    for scale in (1.0, 2.0, 3.0):
        freqs = angles(CHANNELS) * scale
        for mscale in (1.0, 0.5):
            torch.testing.assert_close(rotate(x, freqs, mscale=mscale).double(), mscale * turned(x, freqs), rtol=0, atol=1e-5)


def test_what_it_does_not_know_goes_to_megatron() -> None:
    x = torch.randn(SEQUENCE, 1, 1, CHANNELS)
    with pytest.raises(AssertionError, match="stock function"):
        make_rotate(unreachable)(x, angles(CHANNELS), rotary_interleaved=True)


def test_megatron_rotates_with_it_on_cpu() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    assert rope_utils._apply_rotary_pos_emb_bshd.__module__ == make_rotate.__module__
