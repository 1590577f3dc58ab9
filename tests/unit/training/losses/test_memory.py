"""The loss stays within its budget of memory, and keeps no [tokens, vocabulary] tensor.

Legend: N tokens, V vocabulary, D student's hidden, E teacher's hidden. Bytes are those that torch's allocator was asked for, by its profiler.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minitron_megatron.training.kd_loss import GradientBuffer, fused_distillation_loss
from minitron_megatron.training.losses.memory import tokens_of_a_chunk
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import TokenLabels, WeightedTarget

MIB = 1 << 20
D, E = 8, 12
SLACK = MIB // 2
"""Numbers a token of all tokens and of a chunk: hidden states' gradient, peaks, sums, losses."""
ALL = dict.fromkeys(("forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine", "cross_entropy"), 0.5)
OBJECTIVES = {
    "forward KL": LossSettings(),
    "at a temperature": LossSettings({"forward_kl": 1.0, "cross_entropy": 0.3}, temperature=2.0),
    "in one read": LossSettings({name: weight for name, weight in ALL.items() if name != "jensen_shannon"}, temperature=2.0),
    "Jensen–Shannon": LossSettings({"jensen_shannon": 1.0}, temperature=2.0),
    "top K": LossSettings(temperature=2.0, top_k=50),
    "all": LossSettings(ALL, temperature=2.0, top_k=50),
}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: TokenLabels
    targets: list[WeightedTarget]


def inputs(tokens: int, vocabulary: int, teachers: int = 1, dtype: torch.dtype = torch.float32) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    labels = TokenLabels(torch.arange(tokens) % vocabulary, torch.ones(tokens))
    targets = [WeightedTarget(draw(tokens, E), draw(vocabulary, E)) for _ in range(teachers)]
    return Inputs(draw(tokens, D).requires_grad_(), draw(vocabulary, D).requires_grad_(), labels, targets)


def run(given: Inputs, settings: LossSettings, group: Any, buffer: GradientBuffer) -> Tensor:
    return fused_distillation_loss(*given, settings, rows=len(given.weight), group=group, buffer=buffer)[0]


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that was allocated at one time and had not been before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak


def peak_of_the_loss(given: Inputs, settings: LossSettings, group: Any) -> int:
    buffer = GradientBuffer()
    buffer.give_back(buffer.take(given.weight))  # the [V, D] gradient is not the chunks'
    return peak_bytes(lambda: run(given, settings, group, buffer))


@pytest.mark.parametrize(
    ("name", "vocabulary", "teachers", "dtype", "mib"),
    [
        ("forward KL", 30_000, 1, torch.float32, 96),
        ("forward KL", 9_000, 1, torch.bfloat16, 76),
        ("forward KL", 9_000, 3, torch.float32, 96),
        ("at a temperature", 30_000, 1, torch.bfloat16, 80),
        ("in one read", 30_000, 1, torch.float32, 96),
        ("in one read", 9_000, 2, torch.bfloat16, 80),
        ("Jensen–Shannon", 9_000, 1, torch.float32, 24),
        ("Jensen–Shannon", 9_000, 1, torch.bfloat16, 24),
        ("top K", 9_000, 1, torch.float32, 24),
        ("top K", 9_000, 2, torch.bfloat16, 24),
        ("all", 9_000, 1, torch.float32, 24),
    ],
)
def test_the_peak_is_within_the_budget_and_makes_use_of_it(
    name: str, vocabulary: int, teachers: int, dtype: torch.dtype, mib: int, layout: Any
) -> None:
    settings = replace(OBJECTIVES[name], memory_bytes=mib * MIB)
    peak = peak_of_the_loss(inputs(600, vocabulary, teachers, dtype), settings, layout.groups.tp)
    assert 0.3 * mib * MIB < peak <= mib * MIB + SLACK, f"{peak / MIB:.1f} MiB"


def test_the_peak_does_not_grow_with_the_tokens(layout: Any) -> None:
    peaks = [peak_of_the_loss(inputs(tokens, 9_000), LossSettings(chunk_tokens=32), layout.groups.tp) for tokens in (64, 640)]
    assert peaks[1] - peaks[0] < SLACK  # logits of 576 tokens are 20 MiB


def test_nothing_as_large_as_a_chunks_logits_is_kept_for_backward(layout: Any) -> None:
    given, buffer = inputs(96, 9_000), GradientBuffer()
    before = {id(item) for item in gc.get_objects() if isinstance(item, Tensor)}
    loss = run(given, LossSettings(chunk_tokens=32), layout.groups.tp, buffer)
    kept = [item for item in gc.get_objects() if isinstance(item, Tensor) and id(item) not in before]
    assert {tuple(item.shape) for item in kept if item.numel() >= 9_000} <= {(9_000, D)}
    loss.backward()


def chunk(settings: LossSettings, **changed: Any) -> int:
    given = {"rows": 128_256, "bytes_of_a_logit": 2, "teachers": 1, "in_flight": 1, "device": torch.device("cpu"), **changed}
    return tokens_of_a_chunk(settings, **given)


def test_a_chunk_follows_from_the_recipe_and_the_layout_alone() -> None:
    whole = chunk(LossSettings())
    assert whole % 16 == 0 and whole == chunk(LossSettings())
    assert chunk(LossSettings(), in_flight=2) == pytest.approx(whole / 2, abs=16)  # two chunks under tensor parallelism
    assert chunk(LossSettings(), teachers=3) == pytest.approx(whole / 2, abs=16)
    assert chunk(LossSettings(), bytes_of_a_logit=4) == pytest.approx(whole / 2, abs=16)
    assert chunk(OBJECTIVES["Jensen–Shannon"]) < whole / 4
    assert chunk(LossSettings(chunk_tokens=7), in_flight=2) == 7  # as the recipe says
    assert chunk(LossSettings(memory_bytes=1)) == 1  # there is always a chunk


def test_on_a_gpu_the_whole_budget_is_for_logits() -> None:
    """Compiled kernels have no intermediate results."""
    assert chunk(LossSettings(memory_bytes=100 * 4 * 128_256 * 16), device=torch.device("cuda")) == 1600
