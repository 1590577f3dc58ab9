"""Whole key/value groups, and what kept heads take over from pruned ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.tensors import TensorRow
from minitron_megatron.errors import PlanError
from minitron_megatron.prune.plan import make_plan
from minitron_megatron.prune.rank import residual_partners
from minitron_megatron.prune.slice import slice_tensor
from minitron_megatron.scores.units import group_scores, random_scores

# 4 heads in each of 3 groups: neither number divides the other
GROUPED = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48}
ARCH = Architecture("qwen2", 2, 16, 15, 3, 4, 20, 31, True, 64, 1e-6, 10000.0)  # 5 heads in each of 3 groups


def test_the_config_of_a_model_without_groups_has_their_number(tiny_hf_model: Callable[..., Path], prune_model: Callable[..., Any]) -> None:
    done = prune_model(tiny_hf_model("qwen2", **GROUPED), {"kv_groups": 2})
    config, tensors = json.loads((done.model / "config.json").read_text()), load_file(done.model / "model.safetensors")
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 2, 6)
    assert tuple(tensors["model.layers.0.self_attn.k_proj.bias"].shape) == (12,)
    assert tuple(tensors["model.layers.0.self_attn.o_proj.weight"].shape) == (48, 48)


def test_the_groups_with_the_highest_scores_are_kept_and_heads_are_ranked_in_those() -> None:
    scores = random_scores(ARCH, 3)
    scores = replace(scores, kv_groups=[group_scores(scores_H, ARCH) for scores_H in scores.heads])
    target = ARCH.resized(kv_groups=2, heads=6)
    by_heads = make_plan(scores, ARCH, target)
    for layer in range(2):
        norms = [float(sum(score**2 for score in scores.heads[layer][group * 5 : group * 5 + 5].tolist())) ** 0.5 for group in range(3)]
        worst = norms.index(min(norms))
        assert by_heads.kv_groups[layer] == [group for group in range(3) if group != worst]
        assert [head // 5 for head in by_heads.heads[layer]] == [group for group in by_heads.kv_groups[layer] for _ in range(3)]
        gap = (sorted(norms)[1] - min(norms)) / max(norms)
        assert by_heads.margins["kv_groups"][layer] == pytest.approx(gap, rel=1e-12)
    # ties go to the lower index
    own = replace(scores, kv_groups=[torch.tensor([2.0, 1.0, 2.0]), torch.ones(3)])
    assert make_plan(own, ARCH, target).kv_groups == {0: [0, 2], 1: [0, 1]}


def test_scores_of_groups_must_fit_the_source() -> None:
    scores = random_scores(ARCH, 3)
    with pytest.raises(PlanError, match="kv_groups are of another model"):
        make_plan(replace(scores, kv_groups=[torch.ones(2)] * 2), ARCH, ARCH)
    with pytest.raises(PlanError, match="kv_groups are not all finite"):
        make_plan(replace(scores, kv_groups=[torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])]), ARCH, ARCH)


def by_paper(heads: list[Tensor], importance: list[float], kept: int) -> list[Tensor]:
    """The new heads of one group in the order of their index, by the 1-based formula: for i in [2K − L + 1, K] partner 2K − i + 1."""
    L, K = len(heads), kept
    order = sorted(range(L), key=lambda head: -importance[head])
    one_based = {place: heads[head] for place, head in enumerate(order, start=1)}
    new = {order[i - 1]: one_based[i] + (one_based[i] - one_based[2 * K - i + 1]) if i >= 2 * K - L + 1 else one_based[i] for i in range(1, K + 1)}
    return [new[head] for head in sorted(new)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [3, 2])
@pytest.mark.parametrize("kept", [3, 4])
def test_kept_queries_take_the_residual_of_pruned_ones_by_the_papers_formula(kept: int, groups: int, dtype: torch.dtype) -> None:
    """Weights and biases of the fused tensor; keys and values stay as they are."""
    scores = random_scores(ARCH, 5)
    plan = make_plan(scores, ARCH, ARCH.resized(heads=kept * groups, kv_groups=groups), head_residual=True)
    generator = torch.Generator().manual_seed(2)
    for axes in (("QKV", "D"), ("QKV",)):
        row = TensorRow("decoder.layers.1.self_attention.linear_qkv.weight", (), axes, 1)
        tensor = torch.randn(row.shape(ARCH), generator=generator).to(dtype)
        before = tensor.clone()
        blocks = tensor.double().view(3, 7, 4, -1)  # group, query… key value, channel
        expected = []
        for group in plan.kv_groups[1]:
            importance = scores.heads[1][group * 5 : group * 5 + 5].tolist()
            expected += [*by_paper(list(blocks[group, :5]), importance, kept), blocks[group, 5], blocks[group, 6]]
        found = slice_tensor(row, tensor, plan)
        assert found.dtype == dtype
        # one rounding to bf16; fp32 rounds each of two subtractions
        tolerance = {"rtol": 2**-8, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 0.0, "atol": 1e-6}
        torch.testing.assert_close(found.double().view(-1), torch.stack(expected).flatten(), **tolerance)
        assert torch.equal(tensor, before)
        without = slice_tensor(row, tensor, replace(plan, head_residual={}))
        changed = (found != without).view(groups, kept + 2, -1).any(-1)
        assert changed.sum(1).tolist() == [5 - kept] * groups and not changed[:, kept:].any()


def test_partners_are_those_of_the_formula_and_more_than_half_must_stay() -> None:
    importance = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])  # order 0 2 4 3 1
    assert residual_partners(importance, 1, 3, [0]) == {2: 1, 4: 3}
    assert residual_partners(importance, 1, 4, [0]) == {3: 1}
    assert residual_partners(importance, 1, 5, [0]) == {}
    with pytest.raises(PlanError, match="2 of a group's 5 heads are kept; keep at least half"):
        residual_partners(importance, 1, 2, [0])


def test_the_residual_is_an_option_of_the_recipe_and_stands_in_the_plan(tiny_hf_model: Callable[..., Path], prune_model: Callable[..., Any]) -> None:
    source = tiny_hf_model("qwen2")
    plain, residual = (prune_model(source, {"heads": 6}, head_residual=on) for on in (False, True))
    plans = [json.loads((done.pruned.path / "plan.json").read_text()) for done in (plain, residual)]
    assert plans[0]["head_residual"] == {} and plans[1]["head_residual"].keys() == {"0", "1", "2"}
    assert plans[0]["heads"] == plans[1]["heads"]
    tensors = [load_file(done.model / "model.safetensors") for done in (plain, residual)]
    changed = {name.split("self_attn.")[-1] for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}
    assert changed == {"q_proj.weight", "q_proj.bias"}
    assert source_architecture(str(source)).heads_per_group == 4  # of which 3 are kept: one takes a residual in each group
