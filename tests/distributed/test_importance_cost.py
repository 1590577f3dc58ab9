"""What the importance pass costs beyond a plain forward pass of the same batches: no wait for the device, hardly any memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import Batch, collate
from minitron_megatron.importance import stage, token_sums
from minitron_megatron.importance.stage import measure
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.world import World

from .conftest import Record
from .pool import Pool
from .tiny import LLAMA, ONE, PP2, PP2_VPP2, TP2_SP, RandomSamples, layout_name
from .watched_tensors import PeakMemory, host_reads

LONG, BLOCK = 2048, 1 << 14
"""A sample long enough for its activations to be large, and blocks as small beside them as they are beside a real model's."""
LARGE = replace(LLAMA.resized(layers=3, hidden=96, ffn=160), max_positions=LONG)
ACTIVATION_BYTES = 4 * LONG * (LARGE.layers * (3 * LARGE.hidden + LARGE.heads * LARGE.head_channels + 2 * LARGE.ffn) + 2 * LARGE.hidden)
"""Of all that the hooks see of one sample: outputs of norms and heads, both ends of the FFN's inside, states between layers."""
Pass = Callable[[StageModel, list[Batch]], object]


def plain(model: StageModel, batches: list[Batch]) -> object:
    return forward_only(model, batches, consume=lambda hidden, batch: None)


def with_hooks(model: StageModel, batches: list[Batch]) -> object:
    return measure(model, batches, lambda: None)


def model_of(arch: Architecture, layout: Layout, world: World) -> StageModel:
    model = build_model(arch, layout, world.platform, torch.float32, output_layer=None)
    for weight in model.parameters():
        weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(weight.numel()))
    return model


def batches_of(samples: int, tokens: int) -> list[Batch]:
    return [collate(RandomSamples(samples, tokens), [sample]) for sample in range(samples)]


def reads(world: World, parallel: Parallel, passes: list[Pass]) -> list[list[str]]:
    model, batches, found = model_of(LLAMA, global_layout(parallel, world), world), batches_of(2, 16), []
    for run in passes:
        with host_reads() as seen:
            run(model, batches)
        found.append(seen)
    return found


def with_a_read(model: StageModel, batches: list[Batch]) -> object:
    """The pass with a value asked for at the end of every micro-batch."""
    real = stage._accumulate

    def accumulate(sums: object, found: object, ids: list[int], *rest: object) -> None:
        torch.tensor(ids).sum().item()
        real(sums, found, ids, *rest)  # type: ignore[arg-type]

    with mock.patch.object(stage, "_accumulate", accumulate):
        return with_hooks(model, batches)


@pytest.mark.parametrize("parallel", [ONE, PP2, PP2_VPP2, TP2_SP], ids=layout_name)
def test_the_pass_reads_no_value_from_the_device_that_a_plain_forward_pass_does_not(pool: Pool, parallel: Parallel) -> None:
    """But the ids of its samples, once for each micro-batch and ahead of the first."""
    for without, found, spoilt in pool.run(reads, parallel, [plain, with_hooks, with_a_read], processes=parallel.processes):
        assert sorted(found) == sorted([*without, "tolist", "tolist"])
        assert len(spoilt) > len(found)  # the watch sees what it is for


def peaks(world: World, passes: list[Pass], block_bytes: int) -> list[int]:
    model, batches, found = model_of(LARGE, global_layout(ONE, world), world), batches_of(1, LONG), []
    with mock.patch.object(token_sums, "BLOCK_BYTES", block_bytes):
        for run in passes:
            with PeakMemory() as memory:
                run(model, batches)
            found.append(memory.peak)
    return found


def test_the_pass_takes_two_percent_of_its_activations_more_memory_than_a_plain_forward_pass(pool: Pool, measured: Record) -> None:
    [(without, found)] = pool.run(peaks, [plain, with_hooks], BLOCK, processes=1)
    assert measured("importance: extra memory over activations", "one", (found - without) / ACTIVATION_BYTES) <= 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_tokens_copy_an_activation_block_by_block(dtype: torch.dtype) -> None:
    """By its own, because the pass's peak lies elsewhere: a whole copy would not show there."""
    activation = torch.randn(LONG, 1, LARGE.ffn).to(dtype)
    found = {}
    for block_bytes in (BLOCK, ACTIVATION_BYTES):
        with mock.patch.object(token_sums, "BLOCK_BYTES", block_bytes), PeakMemory() as memory:
            token_sums.token_sums(activation)
        found[block_bytes] = memory.peak
    copy = 4 * activation.numel()
    assert found[BLOCK] <= 0.1 * copy and found[ACTIVATION_BYTES] >= copy
