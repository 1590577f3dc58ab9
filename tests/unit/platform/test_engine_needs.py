"""What Transformer Engine or apex is needed for, on machines that this one is not."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import Platform, engine_needs
from minitron_megatron.platform.engine_needs import require_engine

CPU, CUDA = Platform("cpu", "gloo", torch.device("cpu")), Platform("cuda", "nccl", torch.device("cuda"))
ENGINE = Platform("cuda", "nccl", torch.device("cuda"), transformer_engine=True)


def recipe(*, training: dict[str, Any] | None = None, **parallel: Any) -> Recipe:
    values = {"name": "t", "model": {"path": "m"}, "data": {"train": ["x"]}, "prune": {"target": {"ffn": 8}}, "distill": {"steps": 2}}
    return Recipe.model_validate({**values, "parallel": parallel, "training": training or {}})


@pytest.mark.parametrize("platform", [CPU, CUDA], ids=["cpu", "cuda"])
def test_overlap_of_tensor_parallel_exchange_is_transformer_engines(platform: Platform) -> None:
    overlapped = recipe(training={"overlap_tensor_parallel": True, "distributed_optimizer": False}, tensor=2, sequence=True)
    require_engine(overlapped, ENGINE)
    with pytest.raises(PlatformError, match="overlap_tensor_parallel=true needs Transformer Engine on CUDA; install it, or set it to false"):
        require_engine(overlapped, platform)


@pytest.mark.parametrize("shared", [{"data": 2}, {"context": 2}], ids=str)
def test_a_shared_out_optimizer_needs_an_adam_whose_state_can_be_loaded(monkeypatch: pytest.MonkeyPatch, shared: dict[str, int]) -> None:
    """torch's can be saved and not loaded; over one data-parallel rank nothing is shared out, and a CPU has a kernel of its own."""
    require_engine(recipe(**shared), ENGINE)
    require_engine(recipe(**shared), CPU)
    require_engine(recipe(tensor=2), CUDA)
    require_engine(recipe(training={"distributed_optimizer": False}, **shared), CUDA)
    with pytest.raises(PlatformError, match=r"training.distributed_optimizer=true needs .*; install one of them, or set"):
        require_engine(recipe(**shared), CUDA)
    apex = ModuleSpec("apex", None)
    monkeypatch.setattr(engine_needs, "find_spec", lambda name: apex if name == "apex" else find_spec(name))
    require_engine(recipe(**shared), CUDA)
