"""megatron's config of a model, on machines that this one is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.model import build
from minitron_megatron.model.build import transformer_config
from minitron_megatron.parallel.split import EndWork
from minitron_megatron.platform import Platform, activate


@pytest.mark.parametrize(("family", "fused"), [("llama", True), ("nemotron", False)])
def test_on_a_gpu_the_activation_is_fused_where_megatron_can(layout: Any, family: str, fused: bool) -> None:
    """megatron raises where it is told to fuse squared ReLU."""
    arch = Architecture(family, 3, 24, 8, 2, 6, 16, 131, False, 64, 1e-5, 10000.0)
    config = transformer_config(arch, layout, Platform("cuda", "nccl", torch.device("cuda")), torch.bfloat16, ends=EndWork(0, 0))
    assert config.bias_activation_fusion is fused


def test_overlap_and_deterministic_mode_are_megatrons_on_a_gpu_alone(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU gives the same bits anyway, and has nothing to overlap with."""
    arch, gpu = Architecture("llama", 3, 64, 8, 2, 8, 64, 131, False, 64, 1e-5, 10000.0), torch.device("cuda")
    asked: dict[str, Any] = {"ends": EndWork(0, 0), "deterministic": True}
    without_engine = Platform("cuda", "nccl", gpu)
    assert transformer_config(arch, layout, without_engine, torch.bfloat16, **asked).deterministic_mode
    assert not transformer_config(arch, layout, activate("cpu"), torch.bfloat16, **asked).deterministic_mode
    monkeypatch.setattr(build, "megatron_flags", lambda platform, activation: {})  # those of a GPU need what is not installed here
    engine = Platform("cuda", "nccl", gpu, transformer_engine=True)
    assert transformer_config(arch, layout, engine, torch.bfloat16, overlap_exchange=True, **asked).tp_comm_overlap
