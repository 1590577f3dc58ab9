"""What the hooks see of a micro-batch of several samples, against loops over its tokens; a layer of plain torch modules in megatron's names."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitron_megatron.importance.hooks import MicroBatchSums, collecting
from minitron_megatron.scores.statistics import Key

S, B, D, H, K, F = 7, 3, 10, 6, 4, 5


class Biased(nn.Module):
    """megatron's linear layer: a product, and the bias for whoever applies the activation."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.linear(x), self.bias


class Layer(nn.Module):
    """Attention is a linear map: what matters is where its output is seen."""

    def __init__(self, number: int, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.layer_number, self.config = number + 1, SimpleNamespace(kv_channels=K)
        self.input_layernorm, self.pre_mlp_layernorm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.self_attention.context, self.self_attention.linear_proj = nn.Linear(D, H * K), nn.Linear(H * K, D)
        self.mlp.config = SimpleNamespace(gated_linear_unit=gated)  # type: ignore[assignment]
        self.mlp.linear_fc1, self.mlp.linear_fc2 = Biased(D, 2 * F if gated else F, bias), Biased(F, D, bias)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        context = self.self_attention.context(normed)
        middle = x + self.self_attention.linear_proj(context)
        mlp_normed = self.pre_mlp_layernorm(middle)
        before, bias = self.mlp.linear_fc1(mlp_normed)
        before = before if bias is None else before + bias
        if self.mlp.config.gated_linear_unit:
            before, values = before[..., :F], before[..., F:]
            inner = torch.nn.functional.silu(before) * values
        else:
            inner = before.relu().square()
        self.seen = {"attention_norm": normed, "heads": context, "mlp_norm": mlp_normed, "ffn_before_activation": before, "ffn": inner}
        return middle + self.mlp.linear_fc2(inner)[0]


def seen_sums(*layers: Layer, final_norm: nn.Module | None = None) -> tuple[MicroBatchSums, Tensor]:
    """What was found, and what the final norm gave."""
    x = torch.randn(S, B, D, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), collecting(layers, final_norm) as found:
        for layer in layers:
            x = layer(x)
        return found, final_norm(x) if final_norm else x


def by_loops(x: Tensor, unit: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """[3, B, units] Σ|x|, Σx, Σx² in fp64; unit: a token's values → those of each unit."""
    sums = torch.zeros(3, B, len(unit(x[0, 0])), dtype=torch.float64)
    for sample in range(B):
        for token in range(S):
            for number, value in enumerate(unit(x[token, sample].double())):
                sums[:, sample, number] += torch.stack([value.abs(), value, value.square()])
    return sums


def contributions(weight: Tensor, x: Tensor) -> list[Tensor]:
    """L2 norm of what each head alone would add behind the projection."""
    return [(weight[:, head * K : head * K + K] @ x[head * K : head * K + K].double()).norm() for head in range(H)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_token_sums_of_each_sample_are_those_of_loops_over_its_tokens(gated: bool, bias: bool) -> None:
    """Of a gated FFN the gate's half; of one without a gate, squared ReLU, all of the first matrix' output."""
    torch.manual_seed(3)
    layers, final_norm = [Layer(4, gated=gated, bias=bias), Layer(5, gated=gated, bias=bias)], nn.LayerNorm(D)
    found, normed = seen_sums(*layers, final_norm=final_norm)
    each: Callable[[Tensor], list[Tensor]] = list
    expected: dict[Key, Tensor] = {(number, axis): by_loops(x, each) for number in (4, 5) for axis, x in layers[number - 4].seen.items()}
    for number in (4, 5):
        heads: Callable[[Tensor], list[Tensor]] = lambda x: [x[head * K : head * K + K].pow(2).sum().sqrt() for head in range(H)]  # noqa: E731
        expected[number, "head_norms"] = by_loops(layers[number - 4].seen["heads"], heads)
        weight = layers[number - 4].self_attention.linear_proj.weight.detach().double()
        expected[number, "head_contributions"] = by_loops(layers[number - 4].seen["heads"], lambda x, weight=weight: contributions(weight, x))
    expected[5, "final_norm"] = by_loops(normed, each)
    assert found.token_sums.keys() == expected.keys()
    for key, sums in expected.items():
        torch.testing.assert_close(found.token_sums[key].double(), sums, rtol=1e-5, atol=1e-5)  # fp32 over 7 tokens


def test_a_stage_without_the_final_norm_sees_none_and_hooks_are_gone_afterwards() -> None:
    layer = Layer(0, gated=True, bias=False)
    found, _ = seen_sums(layer)
    assert {axis for _, axis in found.token_sums} == {*layer.seen, "head_norms", "head_contributions"}
    found.clear()
    layer(torch.randn(S, B, D))
    assert not found.token_sums and not hooks_of(layer)


def hooks_of(module: nn.Module) -> list[Any]:
    return [hook for part in module.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks) for hook in hooks.values()]
