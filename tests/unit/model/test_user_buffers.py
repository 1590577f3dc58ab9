"""Transformer Engine's user buffers: made once for the model that is trained, of its shape, and gone at the end. Its own need a GPU: a stand-in."""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from minitron_megatron.errors import PlatformError
from minitron_megatron.model.user_buffers import user_buffers, without_buffers


class Mode(Enum):
    """As Transformer Engine's UserBufferQuantizationMode."""

    NONE = "none"
    FP8 = "fp8"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Transformer Engine was asked for."""
    found: list[Any] = []
    base: Any = ModuleType("transformer_engine.pytorch.module.base")
    base.UserBufferQuantizationMode = Mode
    base.initialize_ub = lambda **arguments: found.append(arguments)
    base.destroy_ub = lambda: found.append("destroyed")
    kernels: Any = ModuleType("transformer_engine_torch")
    kernels.device_supports_multicast = lambda: True
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    return found


def model_of(**config: Any) -> Any:
    settings = {"tp_comm_overlap": True, "context_parallel_size": 2, "hidden_size": 64, "params_dtype": torch.bfloat16, "fp8": None}
    return SimpleNamespace(config=SimpleNamespace(**{**settings, "first_last_layers_bf16": False, **config}), layout=SimpleNamespace(tensor=4))


@pytest.mark.parametrize(
    ("config", "modes"),
    [({}, [Mode.NONE]), ({"fp8": "hybrid"}, [Mode.FP8]), ({"fp8": "hybrid", "first_last_layers_bf16": True}, [Mode.FP8, Mode.NONE])],
    ids=["bf16", "fp8", "fp8 and bf16 ends"],
)
def test_buffers_are_made_once_for_a_micro_batch_and_destroyed_behind_the_run(calls: list[Any], config: dict[str, Any], modes: list[Mode]) -> None:
    with user_buffers(model_of(**config), samples=3, sequence=16):
        [made] = calls
    assert made == {"shape": [24, 64], "tp_size": 4, "quantization_modes": modes, "dtype": torch.bfloat16, "bootstrap_backend": "nccl"}
    assert calls[1:] == ["destroyed"]


def test_buffers_are_destroyed_behind_a_run_that_fails(calls: list[Any]) -> None:
    with pytest.raises(KeyError), user_buffers(model_of(), samples=1, sequence=16):
        raise KeyError("run")
    assert calls[-1] == "destroyed"


def test_without_overlap_there_are_no_buffers(calls: list[Any]) -> None:
    with user_buffers(model_of(tp_comm_overlap=False), samples=1, sequence=16):
        assert calls == []
    assert calls == []


def test_gpus_without_multicast_are_told_ahead_of_transformer_engines_assertion(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformer_engine_torch"], "device_supports_multicast", lambda: False)
    with pytest.raises(PlatformError, match="set UB_SKIPMC=1"), user_buffers(model_of(), samples=1, sequence=16):
        pass
    monkeypatch.setenv("UB_SKIPMC", "1")
    with user_buffers(model_of(), samples=1, sequence=16):
        assert len(calls) == 1


def test_a_validation_exchanges_without_buffers_and_training_with_them_again() -> None:
    """Its micro-batches have another shape. Layers that did not overlap do not begin to."""
    column, row = nn.Linear(1, 1), nn.Linear(1, 1)
    column.ub_overlap_ag_fprop, column.ub_overlap_rs_fprop = True, False  # type: ignore[assignment]
    row.ub_overlap_ag_fprop, row.ub_overlap_rs_fprop = False, True  # type: ignore[assignment]
    seen = lambda: [module.__dict__[name] for module in (column, row) for name in ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop")]  # noqa: E731
    with without_buffers(SimpleNamespace(chunks=[nn.Sequential(column, row)])):  # type: ignore[arg-type]
        assert seen() == [False] * 4
    assert seen() == [True, False, False, True]
