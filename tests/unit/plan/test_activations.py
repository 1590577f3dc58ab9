"""What a forward pass keeps for backward, against the storages that autograd gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kept import kept_bytes

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.model.build import build_model
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.plan.activations import Pass, kept_by_chunk
from minitron_megatron.plan.split import split_of
from minitron_megatron.training.output_layer import DistillationOutputLayer

SAMPLES = 2
LLAMA = Architecture("llama", 3, 48, 8, 2, 6, 80, 131, False, 1024, 1e-5, 10000.0)
FAMILIES = {
    "llama": LLAMA,
    "one head a group": LLAMA.resized(kv_groups=8),
    "qwen3, tied": Architecture("qwen3", 3, 48, 8, 2, 6, 80, 131, True, 1024, 1e-5, 10000.0),
    "qwen2": Architecture("qwen2", 3, 48, 8, 2, 6, 80, 131, False, 1024, 1e-5, 10000.0),
    "nemotron": Architecture("nemotron", 3, 48, 8, 2, 8, 80, 131, False, 1024, 1e-5, 10000.0, rotary_share=0.5),
    "uneven layers": LLAMA.resized(ffn=[80, 24, 40]),
}
CASES = [(name, "none", "fp32", 64) for name in FAMILIES]
CASES += [("llama", recompute, "fp32", 64) for recompute in ("selective", "full")]
CASES += [("llama", "none", "bf16", 64), ("nemotron", "none", "bf16", 600), ("qwen3, tied", "selective", "bf16", 600)]
TOLERANCE = 0.02
"""Of what is kept: megatron's checkpoints and norms keep some numbers that do not grow with the tokens."""


@pytest.mark.parametrize(("family", "recompute", "precision", "sequence"), CASES)
def test_a_pass_keeps_the_bytes_that_are_counted(family: str, recompute: str, precision: str, sequence: int, layout: Any, world: Any) -> None:
    arch, dtype = FAMILIES[family], {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    ends = distillation_work(arch, arch)
    model = build_model(arch, layout, world.platform, dtype, output_layer=DistillationOutputLayer, ends=ends, trainable=True, recompute=recompute)
    split = split_of(arch, Parallel(), ends)
    run = Pass(split, SAMPLES, sequence, dtype.itemsize, recompute, "cpu")
    found = kept_bytes(model.train().last, SAMPLES, sequence)
    assert kept_by_chunk(run, split.chunks(0)[0]) == pytest.approx(found, rel=TOLERANCE)


def test_recomputation_and_shards_keep_less(layout: Callable[..., Any]) -> None:
    whole, halves = (split_of(LLAMA, Parallel(tensor=tensor, sequence=tensor > 1), distillation_work(LLAMA)) for tensor in (1, 2))
    kept = {how: kept_by_chunk(Pass(whole, 1, 64, 2, how, "cuda"), whole.chunks(0)[0]) for how in ("none", "selective", "full")}
    assert kept["full"] < kept["selective"] < kept["none"]
    of_half = kept_by_chunk(Pass(halves, 1, 64, 2, "none", "cuda"), halves.chunks(0)[0])
    assert of_half == pytest.approx(kept["none"] / 2, rel=0.05)  # token ids and masks are not shared out
