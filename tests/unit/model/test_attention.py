"""Core attention against megatron-core's own DotProductAttention, which keeps all scores."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron_megatron.model.modules import CausalAttention
from minitron_megatron.platform.short_attention import LONGEST

CHANNELS = 16


@pytest.fixture
def megatrons_state() -> Iterator[None]:
    """What DotProductAttention asks of a process that has no groups."""
    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()
    tracker.reset()
    tracker.add("model-parallel-rng", 1)
    parallel_state._set_global_memory_buffer()
    yield
    parallel_state.destroy_global_memory_buffer()
    tracker.set_states(before)


def config_of(heads: int, groups: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=heads * CHANNELS,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=CHANNELS,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )


def inputs(sequence: int, samples: int, heads: int, groups: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as parts of one projection's output, as they are in a layer; a gradient of the result."""
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(sequence, samples, heads + 2 * groups, CHANNELS, generator=random)
    gradient = torch.randn(sequence, samples, heads * CHANNELS, generator=random)
    return [part.to(dtype) for part in mixed.split([heads, groups, groups], dim=2)], gradient.to(dtype)


def run(module: Any, parts: list[Tensor], mask: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """The result and the gradients of the three."""
    leaves = [part.detach().requires_grad_() for part in parts]
    result = module(*leaves, mask)
    return [result, *torch.autograd.grad(result, leaves, gradient)]


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize(
    ("sequence", "dtype", "tolerance"),
    [
        *((sequence, torch.float32, 1e-5) for sequence in (5, 128, 600)),
        *((sequence, torch.bfloat16, 1e-2) for sequence in (5, 128, LONGEST)),  # of the largest value: 2⁻⁸ twice or three times
        (LONGEST + 40, torch.bfloat16, 2e-2),  # torch's own kernel, which adds blocks up
    ],
)
@pytest.mark.usefixtures("megatrons_state")
def test_values_and_gradients_are_megatrons(heads: int, groups: int, sequence: int, dtype: torch.dtype, tolerance: float) -> None:
    config = config_of(heads, groups)
    tp: Any = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    stock = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=tp)
    mask = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)[None, None]
    parts, gradient = inputs(sequence, 2, heads, groups, dtype)
    expected = run(stock, [part.float().contiguous() for part in parts], mask, gradient.float())
    for found, wanted in zip(run(CausalAttention(config), parts, None, gradient), expected, strict=True):
        assert found.dtype == dtype and found.shape == wanted.shape
        assert (found.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_sees_all_cached_keys(dtype: torch.dtype) -> None:
    parts, _ = inputs(40, 2, 6, 2, dtype)
    attention = CausalAttention(config_of(6, 2))
    whole = attention(*parts)
    last = attention(parts[0][-1:], *parts[1:])
    torch.testing.assert_close(last[0].float(), whole[-1].float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_given_scale_holds() -> None:
    parts, _ = inputs(7, 1, 2, 2, torch.float32)
    scaled = CausalAttention(config_of(2, 2), softmax_scale=0.5 * CHANNELS**-0.5)(*parts)
    torch.testing.assert_close(scaled, CausalAttention(config_of(2, 2))(0.5 * parts[0], *parts[1:]), rtol=0, atol=1e-6)
