"""The roofline against arithmetic by hand, and the fit against a machine that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.search import LatencyBudget
from minitron_megatron.platform import activate
from minitron_megatron.search.latency import GPUS, Roofline, prompt_layer, token_layer
from minitron_megatron.search.measure import Measured, fit, measure, token_terms

LLAMA_8B = Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 131072, 1e-5, 500000.0)
MIXTRAL = Architecture("mixtral", 32, 4096, 32, 8, 128, 14336, 32000, False, 32768, 1e-5, 1e6, None, None, 8, 2)


def test_one_token_of_llama_8b_is_bound_by_reading_its_weights() -> None:
    """7.5 B matrix weights (all but the embedding) in bf16 and the cache at 3.35 TB/s."""
    request = LatencyBudget(gpu="H100_SXM", batch=1, prompt=1024, generate=64)
    matrices = 32 * (4096 * (32 + 16) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    cache = 32 * 2 * 8 * 128 * (1024 + 32)
    step = 2 * (matrices + cache) / 3.35e12
    prompt = Roofline(GPUS["H100_SXM"], request.model_copy(update={"generate": 0})).seconds(LLAMA_8B)
    whole = Roofline(GPUS["H100_SXM"], request).seconds(LLAMA_8B)
    assert (whole - prompt) / 64 == pytest.approx(step, rel=1e-9)
    assert step == pytest.approx(4.5e-3, rel=0.02)  # what any calculator of 8B in bf16 on an H100 gives


def test_a_long_prompt_is_bound_by_arithmetic() -> None:
    request = LatencyBudget(gpu="A100_SXM_80GB", batch=4, prompt=2048, generate=0)
    tokens = 4 * 2048
    layer = 4096 * (32 + 16) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336
    attention = 2 * 2 * 32 * 128 * (2048 / 2)  # scores and values, two flops a product, half the prompt on average
    flops = 32 * tokens * (2 * layer + attention) + 2 * 4 * 128256 * 4096
    assert Roofline(GPUS["A100_SXM_80GB"], request).seconds(LLAMA_8B) == pytest.approx(flops / 312e12, rel=1e-9)


def test_few_tokens_read_few_experts_and_each_computes_in_two() -> None:
    one, many = (token_layer(MIXTRAL, LatencyBudget(gpu="L4", batch=batch), 2) for batch in (1, 64))
    expert = 3 * 4096 * 14336
    assert many.weight_bytes - one.weight_bytes == pytest.approx(2 * 6 * expert)
    assert many.matrix_flops == pytest.approx(64 * one.matrix_flops)
    assert one.matrix_flops == pytest.approx(2 * (4096 * (32 + 16) * 128 + 32 * 128 * 4096 + 8 * 4096 + 2 * expert))


def test_a_window_bounds_what_is_attended_to() -> None:
    from dataclasses import replace

    windowed, request = replace(LLAMA_8B, family_name="mistral", attention_window=512), LatencyBudget(gpu="L4", prompt=4096, generate=8)
    # token i of P sees min(i, W): W²/2 + (P − W)·W in all
    seen = 512 * 512 / 2 + (4096 - 512) * 512
    assert prompt_layer(windowed, request, 2).attention_flops == pytest.approx(4 * 32 * 128 * seen)
    assert token_layer(windowed, request, 2).cache_bytes == 2 * 2 * 8 * 128 * 512


def test_the_fit_finds_a_machine_that_is_linear() -> None:
    terms = np.random.default_rng(0).uniform(1, 9, (8, 3)) * [1, 1e9, 1e6]
    found = fit(terms, terms @ np.array([2e-4, 3e-12, 0.0]))
    np.testing.assert_allclose(found.coefficients, [2e-4, 3e-12, 0.0], rtol=1e-6, atol=1e-18)
    assert found.residual < 1e-9 and found.left_out is not None and found.left_out < 1e-9


def test_the_residual_tells_how_far_a_machine_is_from_linear_and_no_coefficient_is_negative() -> None:
    random = np.random.default_rng(1)
    terms = random.uniform(1, 9, (12, 3))
    found = fit(terms, terms @ np.array([1.0, 2.0, -0.1]) * (1 + 0.1 * random.standard_normal(12)))
    assert min(found.coefficients) >= 0
    assert 0.03 < found.residual < 0.2  # noise of 10 %, three coefficients
    assert found.left_out is not None and found.left_out > found.residual


def test_too_few_shapes_to_tell_what_is_left_out_say_so() -> None:
    terms = np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 4.0], [1.0, 5.0, 1.0]])
    assert fit(terms, np.array([1.0, 2.0, 3.0])).left_out is None


def test_layers_are_timed_on_this_machine_and_the_fit_survives_its_file() -> None:
    source = Architecture("llama", 4, 64, 8, 2, 8, 128, 131, True, 512, 1e-5, 10000.0)
    request = LatencyBudget(kind="measured", batch=1, prompt=64, generate=8)
    shapes = [source.resized(ffn=ffn, hidden=hidden) for ffn, hidden in ((64, 64), (512, 64), (512, 512), (2048, 512))]
    found = measure(shapes, request, activate("cpu"), torch.float32)
    assert all(value >= 0 for part in (found.prompt, found.token, found.output) for value in part.coefficients)
    assert found.seconds(source.resized(layers=8)) > found.seconds(source) > 0
    assert Measured.from_dict(found.to_dict(), request) == found
    assert len(token_terms(source, request)) == len(found.token.coefficients)
