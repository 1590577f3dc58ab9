"""Which units a plan keeps, and what is cut out of each tensor, against a slow reference with a loop over groups and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table, unpack
from minitron_megatron.errors import PlanError
from minitron_megatron.prune.plan import PrunePlan, make_plan
from minitron_megatron.prune.rank import top, top_heads
from minitron_megatron.prune.slice import slice_rows, slice_tensor
from minitron_megatron.prune.stream import source_rows
from minitron_megatron.scores.units import UnitScores, random_scores

CUTS: dict[str, dict[str, Any]] = {
    "ffn": {"ffn": 17},
    "heads": {"heads": 6},
    "one-head-per-group": {"heads": 2},
    "kv_groups": {"kv_groups": 1, "heads": 4},
    "kv_groups and heads": {"kv_groups": 1, "heads": 3},
    "widths of layers": {"ffn": [17, 28, 5]},
    "hidden": {"hidden": 33},
    "layers": {"layers": 2},
    "experts": {"experts": 4},
    "all": {"layers": 2, "hidden": 30, "heads": 4, "ffn": 9, "experts": 3},
    "all, uneven": {"layers": 2, "hidden": 30, "kv_groups": 1, "heads": 2, "ffn": [9, 4], "experts": 3},
    "nothing": {},
}


def plan_for(folder: Path, sizes: dict[str, Any], seed: int = 3) -> PrunePlan:
    """Experts of all layers have one width, and dense families have no experts."""
    arch = source_architecture(str(folder))
    sizes = {name: size for name, size in sizes.items() if (isinstance(size, int) if arch.experts else name != "experts")}
    return make_plan(random_scores(arch, seed), arch, arch.resized(**sizes))


def test_the_highest_scores_are_kept_in_the_order_of_their_indices() -> None:
    assert top(torch.tensor([0.3, 0.9, 0.1, 0.8, 0.2]), 3) == [0, 1, 3]


def test_the_lower_index_wins_a_tie_wherever_it_stands() -> None:
    """Thousands of equal scores: an unstable sort mixes them only from a certain length on."""
    assert top(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]), 3) == [0, 1, 4]
    scores = torch.zeros(5000, dtype=torch.float64)
    scores[4999] = 1
    assert top(scores, 100) == [*range(99), 4999]
    assert top(torch.zeros(5000), 5000) == list(range(5000))


def test_heads_are_ranked_within_their_group() -> None:
    """The best five heads are all in group 1; each group keeps two all the same."""
    scores = torch.tensor([1.0, 3.0, 2.0, 0.0, 13.0, 11.0, 12.0, 10.0])
    assert top_heads(scores, 2, 2) == [1, 2, 4, 6]
    assert top_heads(torch.ones(8), 2, 3) == [0, 1, 2, 4, 5, 6]  # ties
    assert top_heads(torch.arange(12.0), 4, 1) == [2, 5, 8, 11]


def test_a_plan_keeps_the_best_units_of_every_axis_for_kept_layers(tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    scores = random_scores(arch, 3)
    scores = replace(scores, layers=torch.tensor([0.5, 0.1, 0.9]))
    plan = make_plan(scores, arch, arch.resized(layers=2, hidden=30, ffn=9, heads=4))
    assert (plan.kept_layers, plan.dropped_layers) == ([0, 2], [1])
    assert plan.ffn.keys() == plan.heads.keys() == {0, 2}
    for layer in (0, 2):
        worst_kept = scores.ffn[layer][plan.ffn[layer]].min()
        dropped = [neuron for neuron in range(arch.ffn) if neuron not in plan.ffn[layer]]
        assert len(plan.ffn[layer]) == 9 and worst_kept > scores.ffn[layer][dropped].max()
        for group in range(2):
            kept = [head for head in plan.heads[layer] if head // 4 == group]
            others = [head for head in range(group * 4, group * 4 + 4) if head not in kept]
            assert len(kept) == 2 and scores.heads[layer][kept].min() > scores.heads[layer][others].max()
    assert len(plan.channels) == 30


@pytest.mark.parametrize("axis", ["ffn", "heads", "channels", "layers"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(axis: str, value: float, tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    scores = random_scores(arch, 3)
    broken = getattr(scores, axis)
    (broken[1] if isinstance(broken, list) else broken)[0] = value
    with pytest.raises(PlanError, match=f"{axis} are not all finite"):
        make_plan(scores, arch, arch.resized(ffn=9))


@pytest.mark.parametrize("axis", ["ffn", "heads", "channels", "layers"])
def test_scores_of_another_model_are_refused(axis: str, tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    scores = random_scores(arch, 3)
    part = getattr(scores, axis)
    fewer: UnitScores = replace(scores, **{axis: part[:-1] if axis in ("ffn", "heads") else torch.rand(len(part) + 1)})
    with pytest.raises(PlanError, match="of another model than the source"):
        make_plan(fewer, arch, arch.resized(ffn=9))


def cut_by_hand(name: str, tensor: Tensor, plan: PrunePlan) -> Tensor:
    """What is left of one Hugging Face tensor: written row by row from the names alone, without the table, axes or fused rows."""
    source = plan.source
    layer = int(name.split(".")[2]) if ".layers." in name else None
    part, width = name.removesuffix(".weight").removesuffix(".bias").split(".")[-1], source.head_channels
    if ".experts." in name:
        neurons = plan.expert_ffn[layer][int(name.split(".experts.")[1].split(".")[0])] if layer is not None else []
        part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(part, part)
    elif source.experts and part == "gate":
        tensor = torch.stack([tensor[expert] for expert in plan.experts[layer or 0]])
    elif layer is not None:
        neurons = plan.ffn.get(layer, [])
    if layer is not None:
        head_rows: list[int] = []
        for group in range(source.kv_groups):
            for head in range(source.heads_per_group):
                if group * source.heads_per_group + head in plan.heads[layer]:
                    head_rows += [(group * source.heads_per_group + head) * width + channel for channel in range(width)]
        if part in ("gate_proj", "up_proj"):
            tensor = torch.stack([tensor[neuron] for neuron in neurons])
        elif part == "down_proj":
            tensor = torch.stack([tensor[:, neuron] for neuron in neurons], dim=1)
        elif part == "q_proj":
            tensor = torch.stack([tensor[row] for row in head_rows])
        elif part in ("k_proj", "v_proj"):
            tensor = torch.cat([tensor[group * width : (group + 1) * width] for group in range(source.kv_groups) if group in plan.kv_groups[layer]])
        elif part == "o_proj":
            tensor = torch.stack([tensor[:, row] for row in head_rows], dim=1)
    if part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate", "embed_tokens", "lm_head") and tensor.dim() == 2:
        return torch.stack([tensor[:, channel] for channel in plan.channels], dim=1)
    if part in ("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm", "norm"):
        return torch.stack([tensor[channel] for channel in plan.channels])
    return tensor  # QKV biases and the norms of queries and keys have no channel of the residual stream


@pytest.mark.parametrize("cut", CUTS)
def test_every_slice_is_what_the_slow_reference_cuts(cut: str, every_family: Path) -> None:
    plan = plan_for(every_family, CUTS[cut])
    source, tensors = HuggingFaceSource(every_family, plan.source), load_file(every_family / "model.safetensors")
    origin, seen = source_rows(plan), set()
    for row in tensor_table(plan.target):
        from_row = origin[row.name]
        sliced = slice_tensor(from_row, source.read(from_row), plan)
        assert tuple(sliced.shape) == row.shape(plan.target)
        for name, part in zip(from_row.hf_names, unpack(row, sliced, plan.target), strict=True):
            assert torch.equal(part, cut_by_hand(name, tensors[name], plan)), name
            seen.add(name)
    assert seen == {name for name in tensors if is_kept(name, plan)}


@pytest.mark.parametrize("cut", CUTS)
def test_slabs_of_a_slice_are_the_slice_and_ask_for_no_source_row_twice(cut: str, every_family: Path) -> None:
    plan = plan_for(every_family, CUTS[cut])
    source, origin = HuggingFaceSource(every_family, plan.source), source_rows(plan)
    for row in tensor_table(plan.target):
        if row.axes[0] == "QKV":
            continue
        old, asked = origin[row.name], []

        def read(rows: range, old: TensorRow = old, asked: list[int] = asked) -> torch.Tensor:
            asked.extend(rows)
            return source.read(old, rows)

        size = row.shape(plan.target)[0]
        found = [slice_rows(old, range(start, min(start + 3, size)), read, plan) for start in range(0, size, 3)]
        assert torch.equal(torch.cat(found), slice_tensor(old, source.read(old), plan)), row.name
        assert asked == sorted(set(asked)), row.name


def is_kept(name: str, plan: PrunePlan) -> bool:
    parts = name.split(".")
    if "layers" not in parts:
        return True
    layer = int(parts[2])
    return layer in plan.kept_layers and ("experts" not in parts or int(parts[parts.index("experts") + 1]) in plan.experts[layer])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_and_the_neurons_within_each_are_the_best_of_kept_layers(family: str, tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model(family)))
    scores = random_scores(arch, 3)
    plan = make_plan(scores, arch, arch.resized(layers=2, experts=3, ffn=9))
    assert plan.ffn == {}
    assert list(plan.experts) == list(plan.expert_ffn) == plan.kept_layers
    for layer, experts in plan.experts.items():
        others = [expert for expert in range(arch.experts) if expert not in experts]
        assert len(experts) == 3 and scores.experts[layer][experts].min() > scores.experts[layer][others].max()
        assert list(plan.expert_ffn[layer]) == experts
        for expert, neurons in plan.expert_ffn[layer].items():
            dropped = [neuron for neuron in range(arch.ffn) if neuron not in neurons]
            of_expert = scores.expert_ffn[layer][expert]
            assert len(neurons) == 9 and of_expert[neurons].min() > of_expert[dropped].max()
    assert len({tuple(neurons) for experts in plan.expert_ffn.values() for neurons in experts.values()}) == 6  # each expert has its own


@pytest.mark.parametrize("axis", ["experts", "expert_ffn"])
def test_broken_scores_of_experts_are_refused(axis: str, tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model("mixtral")))
    scores = random_scores(arch, 3)
    fewer = replace(scores, **{axis: [row[:-1] for row in getattr(scores, axis)]})
    with pytest.raises(PlanError, match="of another model than the source"):
        make_plan(fewer, arch, arch.resized(ffn=9))
    getattr(scores, axis)[1].view(-1)[0] = float("nan")
    with pytest.raises(PlanError, match=f"{axis} are not all finite"):
        make_plan(scores, arch, arch.resized(ffn=9))


def test_layers_of_the_target_come_from_the_kept_layers_in_order(tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    scores = replace(random_scores(arch, 3), layers=torch.tensor([0.1, 0.5, 0.9]))
    origin = source_rows(make_plan(scores, arch, arch.resized(layers=2)))
    assert origin["decoder.layers.0.mlp.linear_fc2.weight"].layer == 1
    assert origin["decoder.layers.1.mlp.linear_fc2.weight"].layer == 2
    assert origin["decoder.final_layernorm.weight"].layer is None


def test_slicing_leaves_the_source_tensor_as_it_was(tiny_hf_model: Callable[..., Path]) -> None:
    plan = plan_for(tiny_hf_model("qwen2"), CUTS["all"])
    source = HuggingFaceSource(tiny_hf_model("qwen2"), plan.source)
    for row in tensor_table(plan.source):
        if row.layer is None or row.layer in plan.kept_layers:
            tensor = source.read(row)
            before = tensor.clone()
            slice_tensor(row, tensor, plan)
            assert torch.equal(tensor, before)
