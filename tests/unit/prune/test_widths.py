"""FFNs of different widths: neurons ranked over all layers, and a source whose layers differ already."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.hf_config import architecture_from_hf, hf_config_for
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.errors import PlanError
from minitron_megatron.prune.plan import make_plan
from minitron_megatron.prune.rank import budget_margin, widths_of_budget
from minitron_megatron.prune.slice import slice_tensor
from minitron_megatron.prune.stream import source_rows
from minitron_megatron.scores.units import magnitude_scores, random_scores

EVEN = Architecture("llama", 4, 16, 8, 2, 4, 24, 31, False, 64, 1e-6, 10000.0)
UNEVEN = EVEN.resized(ffn=[24, 8, 15, 20])


def scores_per_layer(widths: tuple[int, ...]) -> list[torch.Tensor]:
    """Later layers have larger scores, as activations do."""
    generator = torch.Generator().manual_seed(4)
    return [10.0**layer * torch.rand(width, generator=generator, dtype=torch.float64) ** (1 + layer) for layer, width in enumerate(widths)]


@pytest.mark.parametrize("neurons", [4, 30, 61, 67])
@pytest.mark.parametrize("widths", [EVEN.ffn_widths, UNEVEN.ffn_widths])
def test_a_budget_keeps_the_best_neurons_of_all_layers_after_the_best_of_each(widths: tuple[int, ...], neurons: int) -> None:
    scores = scores_per_layer(widths)
    relative = [[value / (sum(layer.tolist()) / len(layer)) for value in layer.tolist()] for layer in scores]
    kept = [{layer.index(max(layer))} for layer in relative]
    others = [(value, layer, neuron) for layer, values in enumerate(relative) for neuron, value in enumerate(values) if neuron not in kept[layer]]
    for _, layer, neuron in sorted(others, reverse=True)[: neurons - 4]:
        kept[layer].add(neuron)
    assert widths_of_budget(scores, neurons, 1) == [len(of_layer) for of_layer in kept]


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_widths_are_multiples_and_add_up_to_the_budget(multiple: int) -> None:
    widths = widths_of_budget(scores_per_layer(EVEN.ffn_widths), 48, multiple)
    assert sum(widths) == 48 and not any(width % multiple for width in widths) and min(widths) >= multiple
    assert widths[3] < widths[0]  # scores of later layers are larger, but fewer neurons hold most of their layer's sum


def test_the_margin_of_a_budget_is_the_gap_between_the_last_block_kept_and_the_first_that_goes() -> None:
    """Shares of the layer's mean: 1.6 0.8 0.4 1.2 and 1 1.5 1 0.5; kept after 1.6 and 1.5: 1.2, then 1 and 1, then 0.8."""
    scores = [torch.tensor([16.0, 8.0, 4.0, 12.0]), torch.tensor([0.2, 0.3, 0.2, 0.1])]
    margins = [budget_margin(scores, neurons, 1) for neurons in range(2, 9)]
    assert margins == pytest.approx([None, 0.2 / 1.6, 0, 0.2 / 1.6, 0.3 / 1.6, 0.1 / 1.6, None], abs=1e-7)  # fp32 scores
    assert budget_margin(scores, 6, 2) == pytest.approx((0.75 - 0.6) / 1.4)  # blocks of means 1.4 0.6 and 1.25 0.75


@pytest.mark.parametrize(("neurons", "multiple"), [(24, 8), (68, 4), (97, 1)])
def test_a_budget_that_the_layers_do_not_hold_is_refused(neurons: int, multiple: int) -> None:
    """A block for each layer is the least; of 15 neurons only 12 are in blocks of 4."""
    with pytest.raises(PlanError, match=f"{neurons} neurons in blocks of {multiple} do not fit 4 layers"):
        widths_of_budget(scores_per_layer(UNEVEN.ffn_widths), neurons, multiple)


def test_a_plan_by_budget_keeps_the_best_of_each_layer_and_its_target_has_the_widths() -> None:
    scores = replace(random_scores(EVEN, 2), ffn=scores_per_layer(EVEN.ffn_widths))
    plan = make_plan(scores, EVEN, EVEN.resized(ffn=10, layers=3), dropped_layers=[1], global_ffn_multiple=5)
    assert plan.target.ffn_widths == tuple(len(plan.ffn[layer]) for layer in (0, 2, 3)) and sum(plan.target.ffn_widths) == 30
    for layer, kept in plan.ffn.items():
        others = [neuron for neuron in range(24) if neuron not in kept]
        assert scores.ffn[layer][kept].min() > scores.ffn[layer][others].max()
    assert plan.margins["layers"] is None and plan.margins["ffn"].keys() == {0, 2, 3}
    assert plan.margins["ffn_widths"] == budget_margin([scores.ffn[layer] for layer in (0, 2, 3)], 30, 5) > 0
    assert "ffn_widths" not in make_plan(scores, EVEN, EVEN.resized(ffn=10)).margins


def test_given_layers_are_dropped_whatever_their_scores() -> None:
    scores = replace(random_scores(EVEN, 2), layers=torch.tensor([0.1, 0.9, 0.8, 0.7]))
    assert make_plan(scores, EVEN, EVEN.resized(layers=2), dropped_layers=[1, 2]).kept_layers == [0, 3]
    assert make_plan(scores, EVEN, EVEN.resized(layers=2)).kept_layers == [1, 2]
    with pytest.raises(PlanError, match=r"the layers to drop, \[1\], leave 3 of the source's 4 layers, but the target has 2"):
        make_plan(scores, EVEN, EVEN.resized(layers=2), dropped_layers=[1])


def test_a_source_of_different_widths_is_pruned_and_its_identity_plan_cuts_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {row.name: torch.randn(row.shape(UNEVEN), generator=generator) for row in tensor_table(UNEVEN)}
    magnitudes = magnitude_scores(((row, tensors[row.name]) for row in tensor_table(UNEVEN)), UNEVEN)
    assert [len(layer) for layer in magnitudes.ffn] == list(UNEVEN.ffn_widths)
    down, fused = (tensors[f"decoder.layers.2.mlp.{name}.weight"].double() for name in ("linear_fc2", "linear_fc1"))
    by_hand = (down[:, 6].square().sum() + fused[6].square().sum() + fused[15 + 6].square().sum()).sqrt()
    torch.testing.assert_close(magnitudes.ffn[2][6], by_hand, rtol=1e-6, atol=0)  # summed in fp32
    for scores in (magnitudes, random_scores(UNEVEN, 3)):
        same, cut = make_plan(scores, UNEVEN, UNEVEN), make_plan(scores, UNEVEN, UNEVEN.resized(ffn=[20, 8, 11, 20]))
        for row in tensor_table(UNEVEN):
            assert torch.equal(slice_tensor(row, tensors[row.name], same), tensors[row.name])
            assert slice_tensor(source_rows(cut)[row.name], tensors[row.name], cut).shape == row.shape(cut.target)
        gate_and_up = slice_tensor(next(row for row in tensor_table(UNEVEN) if row.name.endswith("layers.2.mlp.linear_fc1.weight")), fused, cut)
        assert torch.equal(gate_and_up, fused[[*cut.ffn[2], *(15 + neuron for neuron in cut.ffn[2])]])


def test_a_config_of_our_own_keeps_the_widths_and_one_for_transformers_has_none() -> None:
    config = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": 31, "max_position_embeddings": 64}
    ours = json.loads(json.dumps(hf_config_for(config, [0, 1, 2, 3], UNEVEN)))
    assert architecture_from_hf(ours) == UNEVEN
    again = hf_config_for(ours, [0, 1, 2, 3], EVEN)
    assert architecture_from_hf(again) == EVEN and again.keys() == ours.keys() - {"ffn_per_layer"}


def test_an_architecture_of_different_widths_survives_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(UNEVEN.to_dict()))
    assert Architecture.from_dict(json.loads((tmp_path / "a.json").read_text())) == UNEVEN
    assert UNEVEN.resized(ffn=[24] * 4) == EVEN == UNEVEN.resized(ffn=24)
