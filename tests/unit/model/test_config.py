"""megatron's config of a model, on machines that this one is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.errors import LayoutError
from minitron_megatron.model.build import transformer_config
from minitron_megatron.parallel.split import EndWork
from minitron_megatron.platform import Platform


@pytest.mark.parametrize(("family", "fused"), [("llama", True), ("nemotron", False)])
def test_on_a_gpu_the_activation_is_fused_where_megatron_can(layout: Any, family: str, fused: bool) -> None:
    """megatron raises where it is told to fuse squared ReLU."""
    arch = Architecture(family, 3, 24, 8, 2, 6, 16, 131, False, 64, 1e-5, 10000.0)
    config = transformer_config(arch, layout, Platform("cuda", "nccl", torch.device("cuda")), torch.bfloat16, ends=EndWork(0, 0))
    assert config.bias_activation_fusion is fused


def test_context_ranks_in_fp32_are_refused_where_the_attention_is_transformer_engines(layout: Any) -> None:
    """Of its attentions only those of 16 bits share sequences out; it would say that it has none, at the first step."""
    arch = Architecture("llama", 3, 24, 8, 2, 6, 16, 131, False, 64, 1e-5, 10000.0)
    shared, engine = replace(layout, context=2), Platform("cuda", "nccl", torch.device("cuda"), transformer_engine=True)
    with pytest.raises(LayoutError, match=r"parallel.context=2: .* set precision=bf16, or parallel.context=1"):
        transformer_config(arch, shared, engine, torch.float32, ends=EndWork(0, 0))
    ours = transformer_config(arch, shared, replace(engine, transformer_engine=False), torch.float32, ends=EndWork(0, 0))
    assert ours.context_parallel_size == 2
