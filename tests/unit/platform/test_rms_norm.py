"""The CPU's RMSNorm against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitron_megatron.platform.rms_norm import rms_norm

EPS = 1e-5


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("shape", [(5, 2, 48), (4, 2, 3, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])  # of the largest value: 2⁻⁸ and sums of few
def test_values_and_gradients_are_the_formulas(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=random)).to(dtype)
    weight = (1 + torch.rand(shape[-1], generator=random)).to(dtype)
    gradient = torch.randn(shape, generator=random).to(dtype)
    ours, exact = ([tensor.detach().to(kind).requires_grad_() for tensor in (x, weight)] for kind in (dtype, torch.float64))
    before = x.clone()
    y, expected = rms_norm(*ours, EPS), reference(*exact)
    y.backward(gradient)
    expected.backward(gradient.double())
    for found, wanted in [(y, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert found is not None and wanted is not None and found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert torch.equal(ours[0].detach(), before)  # fp32 is not worked on in place


def test_a_part_of_a_wider_tensor_is_normed_as_its_copy() -> None:
    wide = torch.randn(6, 2, 40).bfloat16()
    weight = torch.ones(24).bfloat16()
    assert torch.equal(rms_norm(wide[..., :24], weight, EPS), rms_norm(wide[..., :24].contiguous(), weight, EPS))
