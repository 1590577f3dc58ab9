"""Delayed scaling's memory of Transformer Engine's layers, told by stand-ins with its attributes: its own layers need a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitron_megatron.model.fp8 import engine_scaling
from minitron_megatron.model.fp8.state import scaling_state, unmoved_scaling

PASSES, TENSORS = 4, 3
NAMES = ["forward.amax_history", "forward.scale", "backward.amax_history", "backward.scale"]


class Linear(nn.Module):
    """What Transformer Engine's Linear shows of itself; a forward pass notes the largest value without gradients too."""

    def __init__(self, recipe: str = "delayed") -> None:
        super().__init__()
        self.config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
        self.fp8_meta: dict[str, Any] = {}
        self.fp8_meta_tensors_initialized = self.fuse_wgrad_accumulation = False

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        for key in ("scaling_fwd", "scaling_bwd"):
            number = TENSORS * self.fp8_meta["num_gemms"]
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(number), amax_history=torch.zeros(PASSES, number))
        self.fp8_meta_tensors_initialized = True

    def forward(self, x: Tensor) -> Tensor:
        self.fp8_meta["scaling_fwd"].amax_history[0, 0] = x.abs().max()
        return x


@pytest.fixture(autouse=True)
def _no_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_scaling, "get_fp8_recipe", lambda config: config.fp8_recipe)


def model_of(*linears: nn.Module) -> Any:
    layers = [nn.ModuleDict({"linear_fc1": linear}) for linear in linears]
    for number, layer in enumerate(layers):
        setattr(layer, "layer_number", number + 3)  # noqa: B010 - as megatron sets it, counted from 1 over the whole model
    return SimpleNamespace(layers=lambda: iter(layers))


def test_a_layer_has_its_memory_before_its_first_pass_and_by_the_number_of_the_whole_model() -> None:
    state = scaling_state(model_of(Linear(), Linear()))
    assert list(state) == [f"fp8.layers.{layer}.linear_fc1.{name}" for layer in (2, 3) for name in NAMES]
    assert state["fp8.layers.2.linear_fc1.forward.amax_history"].shape == (PASSES, TENSORS)


def test_what_is_filled_in_is_what_the_layer_computes_with() -> None:
    linear = Linear()
    for tensor in engine_scaling.engine_scaling_state(linear).values():
        tensor.fill_(7.0)
    assert float(linear.fp8_meta["scaling_bwd"].scale[2]) == 7.0
    again = engine_scaling.engine_scaling_state(linear)
    assert all(bool((tensor == 7.0).all()) for tensor in again.values())  # asking once more makes nothing anew


def test_grouped_experts_have_a_scale_for_each_product() -> None:
    linear = Linear()
    linear.num_gemms = 4  # type: ignore[assignment]
    assert engine_scaling.engine_scaling_state(linear)["forward.scale"].shape == (4 * TENSORS,)


@pytest.mark.parametrize("module", [Linear("tensorwise"), Linear("blockwise"), nn.Linear(2, 2)], ids=["tensorwise", "blockwise", "plain"])
def test_other_scalings_and_other_modules_remember_nothing(module: nn.Module) -> None:
    assert engine_scaling.engine_scaling_state(module) == {}


def test_a_validation_leaves_the_memory_as_it_was() -> None:
    linear = Linear()
    model = model_of(linear)
    scaling_state(model)["fp8.layers.2.linear_fc1.forward.amax_history"][0, 0] = 2.0
    with unmoved_scaling(model), torch.no_grad():
        linear(torch.tensor([9.0]))
        assert float(linear.fp8_meta["scaling_fwd"].amax_history[0, 0]) == 9.0
    assert float(linear.fp8_meta["scaling_fwd"].amax_history[0, 0]) == 2.0
