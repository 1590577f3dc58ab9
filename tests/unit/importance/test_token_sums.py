"""Sums over tokens, block by block and without blocks, against whole tensors in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minitron_megatron.importance import token_sums as module
from minitron_megatron.importance.token_sums import cosine_sums, head_norm_sums, sums_without_blocks, token_norms, token_sums

S, B, H, K = 37, 3, 6, 4
FP32 = {"rtol": 2e-6, "atol": 2e-6}
"""37 additions in another order."""


@pytest.fixture(params=[1, 5 * 4 * B * H * K, 1 << 20], ids=["rows one by one", "5 rows", "all rows"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "BLOCK_BYTES", request.param)
    yield


def states(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[S, B, H·K], every second half of a wider tensor, as a gate is."""
    return torch.randn(S, B, 2 * H * K, generator=torch.Generator().manual_seed(seed)).to(dtype)[..., : H * K]


def sums(x: Tensor) -> Tensor:
    return torch.stack([x.abs().sum(0), x.sum(0), x.square().sum(0)])


@pytest.mark.parametrize("way", [token_sums, sums_without_blocks], ids=["blocks", "no blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_sums_are_those_of_the_whole_tensor_and_leave_it_as_it_was(blocks: None, dtype: torch.dtype, way: Callable[[Tensor], Tensor]) -> None:
    x = states(dtype)
    found = way(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), sums(x.double()), **FP32)
    assert torch.equal(x, states(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [3, 40])
def test_norms_of_heads_are_those_of_their_own_output_and_of_what_it_adds(blocks: None, dtype: torch.dtype, outputs: int) -> None:
    weight_HDK = torch.randn(H, outputs, K, generator=torch.Generator().manual_seed(1))
    x = states(dtype)
    heads = x.double().unflatten(-1, (H, K))
    before, behind = head_norm_sums(x, torch.linalg.qr(weight_HDK, mode="r").R)
    torch.testing.assert_close(before.double(), sums(heads.norm(dim=-1)), **FP32)
    added = torch.einsum("sbhk,hdk->sbhd", heads, weight_HDK.double())
    torch.testing.assert_close(behind.double(), sums(added.norm(dim=-1)), rtol=1e-5, atol=1e-5)  # QR in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosines_are_torchs_own_and_zero_of_a_state_of_zeros(blocks: None, dtype: torch.dtype) -> None:
    before, after = states(dtype), states(dtype) + states(dtype, seed=1) / 2
    before[4, 1] = 0
    found = cosine_sums(before, after, token_norms(before), token_norms(after))
    torch.testing.assert_close(found.double(), F.cosine_similarity(before.double(), after.double(), dim=-1).sum(0), **FP32)
