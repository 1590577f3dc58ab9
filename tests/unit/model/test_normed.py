"""A layer's normed states are the same wherever its norms are kept: what importance sees, and what checkpoints hold, does not depend on the spec."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_layers import FusedLinear, fused_layers
from torch import Tensor, nn

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state
from minitron_megatron.data.batches import Batch
from minitron_megatron.importance.hooks import collecting
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.normed import attention_norm, on_state
from minitron_megatron.model.run import forward_only
from minitron_megatron.platform import activate

SIZES = (3, 24, 8, 2, 6, 16, 131)
SHAPES = {
    "llama": Architecture("llama", *SIZES, False, 64, 1e-5, 10000.0),
    "uneven": Architecture("llama", *SIZES, False, 64, 1e-5, 10000.0).resized(ffn=[12, 16, 8]),
    "qwen2": Architecture("qwen2", *SIZES, True, 64, 1e-6, 1000.0),
    "qwen3": Architecture("qwen3", *SIZES, False, 64, 1e-6, 1000.0),
    "nemotron": Architecture("nemotron", *SIZES, False, 64, 1e-5, 10000.0, rotary_share=0.67),
    "mixtral": Architecture("mixtral", *SIZES, False, 64, 1e-5, 10000.0, None, None, 4, 2),
}
BATCH = Batch(
    torch.arange(24).view(3, 8) * 5, torch.zeros(3, 8, dtype=torch.int64), torch.ones(3, 8), torch.arange(8).expand(3, 8), torch.tensor([4, 7, 9])
)


def make(arch: Architecture, layout: Any, *, fused: bool) -> StageModel:
    with fused_layers() if fused else nullcontext():
        return build_model(arch, layout, activate("cpu"), torch.float32)


def randomise(model: StageModel) -> None:
    torch.manual_seed(4)
    for name, weight in model.last.named_parameters():
        weight.data.normal_(std=0.3)
        if "norm" in name and name.endswith("weight"):
            weight.data += 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("writer_fused", [False, True], ids=["local to fused", "fused to local"])
def test_checkpoints_of_either_spec_load_under_the_other_and_importance_sees_the_same(
    layout: Any, tmp_path: Path, shape: str, writer_fused: bool
) -> None:
    writer, reader = (make(SHAPES[shape], layout, fused=fused) for fused in (writer_fused, not writer_fused))
    randomise(writer)
    (tmp_path / "weights").mkdir()
    save_state(model_state(writer), tmp_path / "weights")
    load_model(reader, tmp_path / "weights")
    found = []
    for model in (writer, reader):
        with torch.no_grad(), collecting(model.layers(), model.last.decoder.final_layernorm) as sums:
            sums.sample_ids_B = BATCH.sample_ids_B
            output = forward_only(model, [BATCH])[0]
            experts = {(number, axis): value for number, seen in sums.experts.items() for axis, value in seen.axes().items()}
            found.append({"output": output, **sums.token_sums, **sums.cosine_sums, **experts})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and {(0, "attention_norm"), (2, "mlp_norm")} <= ours.keys()
    for key, expected in ours.items():
        assert (theirs[key] - expected).abs().max() <= 1e-5 * expected.abs().max(), key  # fp32, norms added up in another order


def test_a_fused_norm_is_read_behind_what_waits_for_its_parameters() -> None:
    """megatron's wrapper gathers a module's parameters in a hook ahead of its forward pass, which is registered after ours."""
    linear = Sharp(torch.zeros(2))
    seen: list[Tensor] = []
    on_state(linear, lambda state, product: seen.append(state()))

    def gather(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        linear.layer_norm_weight.data.fill_(2.0)

    linear.register_forward_pre_hook(gather)
    linear(torch.tensor([3.0, -3.0]))
    torch.testing.assert_close(seen[0], torch.tensor([2.0, -2.0]))


def test_bf16_states_are_rounded_once() -> None:
    """A weight kept as its distance from 1 loses its last bits if 1 is added in bf16."""
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(400, generator=generator).bfloat16() for _ in range(2))
    linear = Sharp(weight * 0.01, zero_centred=True)
    seen: list[Tensor] = []
    on_state(linear, lambda state, product: seen.append(state()))
    linear(x)
    normed = x.double() / x.double().square().mean().sqrt()
    assert torch.equal(seen[0], (normed * (1 + linear.layer_norm_weight.double())).bfloat16())
    assert not torch.equal(seen[0], (normed * (1 + linear.layer_norm_weight).double()).bfloat16())


class Sharp(nn.Module):
    """te.LayerNormLinear's attributes and no epsilon; the product is the input."""

    normalization, eps, layer_norm_bias = "RMSNorm", 0.0, None

    def __init__(self, weight: Tensor, zero_centred: bool = False) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(weight)
        self.zero_centered_gamma = zero_centred

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def test_the_state_of_a_fused_layer_has_gradients_to_its_weight_and_its_input(layout: Any) -> None:
    model = make(SHAPES["nemotron"], layout, fused=True)
    randomise(model)
    linear = attention_norm(next(model.layers()))
    assert isinstance(linear, FusedLinear)
    x = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = [linear.layer_norm_weight.requires_grad_(), linear.layer_norm_bias.requires_grad_()]
    states: list[Tensor] = []
    on_state(linear, lambda state, product: states.append(state()))
    linear(x)
    found = torch.autograd.grad(states[0].square().sum(), [x, *weights])
    centred = x - x.mean(-1, keepdim=True)
    plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weights[0] + 1) + weights[1]
    expected = torch.autograd.grad(plain.square().sum(), [x, *weights])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # fp32
