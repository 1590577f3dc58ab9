"""A pruned model computes what the unpruned transformers model computes with the cut units taken out of it by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.artifact import Artifact

Prune = Callable[..., Any]
CUTS = {
    "ffn": {"ffn": 17},
    # transformers asks of llama that heads divide the hidden size
    "heads": {"heads": 4},
    "hidden": {"hidden": 32},
    "layers": {"layers": 2},
    "all": {"layers": 2, "hidden": 30, "heads": 6, "ffn": 9},
}
EXPERT_CUTS: dict[str, dict[str, int]] = {
    "experts": {"experts": 3},
    "expert neurons": {"ffn": 16},
    "all": {"layers": 2, "hidden": 32, "heads": 6, "ffn": 8, "experts": 4},
}


def all_cuts(source: Path) -> dict[str, int]:
    """Widths of experts are multiples of 8."""
    return EXPERT_CUTS["all"] if source_architecture(str(source)).experts else CUTS["all"]


def tokens() -> Tensor:
    return torch.randint(131, (2, 40), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tokens(), use_cache=False).logits


def without(count: int, kept: list[int]) -> list[int]:
    return [index for index in range(count) if index not in kept]


@torch.no_grad()
def removed_by_hand(folder: Path, plan: dict[str, Any]) -> Any:
    """The source in its own shape: dropped units write zeros, dropped layers are gone.

    Dropped channels carry zeros through every residual; a norm over D channels of which only d are not zero is the norm over d
    with its weight times √(d/D) and its eps times d/D.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    source, target = plan["source"], plan["target"]
    width, share = source["head_channels"], target["hidden"] / source["hidden"]
    dropped = without(source["hidden"], plan["channels"])
    for layer in plan["kept_layers"]:
        module = model.model.layers[layer]
        if source["experts"]:
            keep_experts(module.mlp, plan["experts"][str(layer)], plan["expert_ffn"][str(layer)], source["ffn"])
        else:
            module.mlp.down_proj.weight[:, without(source["ffn"], plan["ffn"][str(layer)])] = 0
        for head in without(source["heads"], plan["heads"][str(layer)]):
            module.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
        down = module.mlp.experts.down_proj.transpose(0, 1) if source["experts"] else module.mlp.down_proj.weight
        for writer in (module.self_attn.o_proj.weight, down):
            writer[dropped] = 0
    if model.config.tie_word_embeddings:  # the output weight meets only channels that are zero there
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.model.embed_tokens.weight[:, dropped] = 0
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm")) and model.config.model_type == "nemotron":
            module.forward = partial(norm_of_kept, module, torch.tensor(plan["channels"]))
        elif name.endswith(("layernorm", "model.norm")):
            module.weight *= math.sqrt(share)
            module.variance_epsilon *= share
    model.model.layers = nn.ModuleList(model.model.layers[layer] for layer in plan["kept_layers"])
    model.config.num_hidden_layers = len(plan["kept_layers"])
    return model


def norm_of_kept(module: Any, kept: Tensor, x: Tensor) -> Tensor:
    """Mean and variance of the kept channels alone; the others stay 0."""
    inner = torch.nn.functional.layer_norm(x[..., kept], (len(kept),), 1 + module.weight[kept], module.bias[kept], module.eps)
    return torch.zeros_like(x).index_copy(-1, kept, inner)


@torch.no_grad()
def keep_experts(block: Any, kept: list[int], neurons: dict[str, list[int]], ffn: int) -> None:
    """Cut neurons write nothing; cut experts and their router rows are gone, for the softmax must not see them."""
    for expert in kept:
        block.experts.down_proj[expert][:, without(ffn, neurons[str(expert)])] = 0
    for owner, name in ((block.experts, "gate_up_proj"), (block.experts, "down_proj"), (block.gate, "weight")):
        setattr(owner, name, nn.Parameter(getattr(owner, name)[kept].clone()))
    block.experts.num_experts = block.gate.num_experts = len(kept)


@pytest.mark.parametrize("cut", EXPERT_CUTS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_cut_of_experts_is_the_source_without_the_cut_units(
    family: str, cut: str, tiny_hf_model: Callable[..., Path], prune_model: Prune
) -> None:
    assert_computes_the_same(tiny_hf_model(family), prune_model, EXPERT_CUTS[cut])


def test_a_model_without_some_of_its_experts_loads_with_their_number(tiny_hf_model: Callable[..., Path], prune_model: Prune) -> None:
    from transformers import AutoModelForCausalLM

    for family in ("mixtral", "qwen3_moe"):
        done = prune_model(tiny_hf_model(family), EXPERT_CUTS["all"])
        model, report = AutoModelForCausalLM.from_pretrained(done.model, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, done.target.experts_per_token)
        assert tuple(model.model.layers[0].mlp.experts.gate_up_proj.shape) == (4, 2 * 8, 32)


def test_magnitude_pruning_drops_the_expert_whose_weights_are_zero(tiny_hf_model: Callable[..., Path], tmp_path: Path, prune_model: Prune) -> None:
    import shutil

    from safetensors.torch import save_file

    folder = Path(shutil.copytree(tiny_hf_model("mixtral"), tmp_path / "zeroed"))
    tensors = load_file(folder / "model.safetensors")
    for layer, expert in ((0, 4), (1, 0), (2, 2)):
        for name in [name for name in tensors if f"layers.{layer}.block_sparse_moe.experts.{expert}." in name]:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    plan = json.loads((prune_model(folder, {"experts": 4}, scores="magnitude").pruned.path / "plan.json").read_text())
    assert {layer: without(5, kept) for layer, kept in plan["experts"].items()} == {"0": [4], "1": [0], "2": [2]}


@pytest.mark.parametrize("cut", CUTS)
def test_each_cut_alone_is_the_source_without_the_cut_units(cut: str, tiny_hf_model: Callable[..., Path], prune_model: Prune) -> None:
    assert_computes_the_same(tiny_hf_model("qwen2"), prune_model, CUTS[cut])


def test_all_cuts_together_are_the_source_without_the_cut_units(every_family: Path, prune_model: Prune) -> None:
    assert_computes_the_same(every_family, prune_model, all_cuts(every_family))


# 4 heads in each of 3 groups: neither number divides the other
GROUPED = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48}


@pytest.mark.parametrize("sizes", [{"kv_groups": 2}, {"kv_groups": 2, "heads": 6}, {"kv_groups": 1, "heads": 3, "layers": 2, "hidden": 36, "ffn": 9}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_model_without_whole_groups_computes_what_the_source_does_without_them(
    family: str, sizes: dict[str, int], tiny_hf_model: Callable[..., Path], prune_model: Prune
) -> None:
    """Loaded by plain transformers, against the source whose cut heads write zeros; biases (qwen2) and norms of queries (qwen3) included."""
    source = tiny_hf_model(family, **GROUPED)
    sizes = {**sizes, "hidden": sizes.get("hidden", 48)}
    assert_computes_the_same(source, prune_model, sizes)


@pytest.mark.parametrize("widths", [{"ffn": [9, 28, 17]}, {"ffn": [5, 6], "layers": 2, "kv_groups": 1}])
def test_a_model_with_ffns_of_different_widths_computes_the_same_when_exported(
    widths: dict[str, Any], tiny_hf_model: Callable[..., Path], prune_model: Prune
) -> None:
    """Its layers are filled up with zeros to the widest one: transformers' config has one width."""
    assert_computes_the_same(tiny_hf_model("qwen2"), prune_model, widths)
    done = prune_model(tiny_hf_model("qwen2"), widths)
    assert done.target.ffn_per_layer == tuple(widths["ffn"])
    config = json.loads((done.model / "config.json").read_text())
    assert config["intermediate_size"] == max(widths["ffn"]) and "ffn_per_layer" not in config
    tensors = load_file(done.model / "model.safetensors")
    for layer, width in enumerate(widths["ffn"]):
        for part in ("gate_proj", "up_proj"):
            rows = tensors[f"model.layers.{layer}.mlp.{part}.weight"]
            assert rows[:width].abs().min() > 0 and not rows[width:].any()


def test_neurons_ranked_over_all_layers_keep_their_budget_and_compute_the_same(tiny_hf_model: Callable[..., Path], prune_model: Prune) -> None:
    done = assert_computes_the_same(tiny_hf_model("llama"), prune_model, {"ffn": 13}, ffn_by="global", align={"ffn": 2})
    widths = done.target.ffn_widths
    assert sum(widths) == 3 * 14 and len(set(widths)) > 1 and not any(width % 2 for width in widths)
    assert done.pruned.result["rounding"] == ["ffn 13 → 14 (multiple of 2)"]


def assert_computes_the_same(source: Path, prune_model: Prune, sizes: dict[str, Any], **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    done = prune_model(source, sizes, seed=4, **settings)
    plan = json.loads((done.pruned.path / "plan.json").read_text())
    actual = logits(AutoModelForCausalLM.from_pretrained(done.model))
    torch.testing.assert_close(actual, logits(removed_by_hand(source, plan)), rtol=0, atol=1e-4)  # fp32: fewer terms in each sum
    assert (actual - logits(AutoModelForCausalLM.from_pretrained(source))).abs().max() > 0.1  # something was cut
    return done


def test_a_plan_that_cuts_nothing_leaves_every_bit(every_family: Path, prune_model: Prune) -> None:
    done = prune_model(every_family, {}, scores="magnitude")
    assert done.pruned.result["weights_sha256"] == done.imported.result["weights_sha256"]
    assert done.pruned.result["dropped_layers"] == []
    original, back = load_file(every_family / "model.safetensors"), load_file(done.model / "model.safetensors")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name].view(torch.uint8), back[name].view(torch.uint8)) for name in original)


def test_the_exported_config_is_the_pruned_architecture(every_family: Path, prune_model: Prune) -> None:
    from transformers import AutoConfig

    sizes = all_cuts(every_family)
    done = prune_model(every_family, sizes)
    config = AutoConfig.from_pretrained(done.model)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, sizes["hidden"], 6)
    assert getattr(config, "moe_intermediate_size", config.intermediate_size) == sizes["ffn"]
    assert getattr(config, "num_experts", None) == sizes.get("experts")
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 6, 131)
    assert done.pruned.result["parameters"] == sum(tensor.numel() for tensor in load_file(done.model / "model.safetensors").values())


def test_the_same_plan_gives_the_same_digest_and_another_seed_another(tiny_hf_model: Callable[..., Path], prune_model: Prune) -> None:
    source = tiny_hf_model("llama")
    first, again, other = (prune_model(source, CUTS["all"], seed=seed).pruned.result["weights_sha256"] for seed in (1, 1, 2))
    assert first == again != other


def test_magnitude_pruning_drops_the_neuron_whose_weights_are_zero(tiny_hf_model: Callable[..., Path], tmp_path: Path, prune_model: Prune) -> None:
    import shutil

    from safetensors.torch import save_file

    folder = Path(shutil.copytree(tiny_hf_model("llama"), tmp_path / "zeroed"))
    tensors = load_file(folder / "model.safetensors")
    for layer, neuron in ((0, 5), (1, 0), (2, 27)):
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"][neuron] = 0
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, neuron] = 0
    save_file(tensors, folder / "model.safetensors")
    plan = json.loads((prune_model(folder, {"ffn": 27}, scores="magnitude").pruned.path / "plan.json").read_text())
    assert {layer: without(28, kept) for layer, kept in plan["ffn"].items()} == {"0": [5], "1": [0], "2": [27]}


def test_scores_of_another_model_are_refused(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    from minitron_megatron.arch.source import source_architecture
    from minitron_megatron.artifact import Artifact, write_json
    from minitron_megatron.config.prune import Prune as PruneSettings
    from minitron_megatron.errors import ArtifactError
    from minitron_megatron.prune.stage import _scores
    from minitron_megatron.scores.statistics import Statistics

    arch = source_architecture(str(tiny_hf_model("llama")))
    Statistics(arch, 1, {(0, "ffn"): torch.ones(3, 2, arch.ffn)}, {"model": "another"}).save(tmp_path / "scores.safetensors")
    write_json(tmp_path / "result.json", {"weights_sha256": "this"})
    inputs = {name: Artifact(tmp_path, {"id": name}) for name in ("import", "importance")}
    settings = PruneSettings.model_validate({"target": {"ffn": 9}})
    with pytest.raises(ArtifactError, match="was measured on another model"):
        _scores(settings, inputs, None)  # type: ignore[arg-type] - the source is for magnitudes


def test_one_scores_file_is_ranked_by_each_criterion_that_the_recipe_names(
    tiny_hf_model: Callable[..., Path], tmp_path: Path, prune_model: Prune
) -> None:
    """Scores rise with the index by the default criteria and fall by the others; only channels' final norm outweighs the layers' norms."""
    from minitron_megatron.arch.source import source_architecture
    from minitron_megatron.scores.statistics import Statistics, measured_keys

    source, sizes = tiny_hf_model("llama"), {"ffn": 9, "heads": 6, "hidden": 30}
    arch = source_architecture(str(source))
    widths = {"ffn": arch.ffn, "heads": arch.heads * arch.head_channels, "head_norms": arch.heads, "head_contributions": arch.heads, "influence": 1}
    sums = {}
    for layer, axis in measured_keys(arch):
        width = widths.get(axis.removesuffix("_before_activation"), arch.hidden)
        ramp = torch.arange(1, width + 1, dtype=torch.float64)
        falls = axis in ("ffn_before_activation", "head_norms", "final_norm")
        sums[layer, axis] = (100 * ramp.flip(0) if falls else ramp).expand(3, 2, width).clone() if axis != "influence" else torch.ones(2).double()
    digest = prune_model(source, sizes).imported.result["weights_sha256"]
    Statistics(arch, 1, sums, {"model": digest}).save(tmp_path / "scores.safetensors")

    def pruned(**criteria: str) -> Artifact:
        return prune_model(source, sizes, scores="activation", scores_file=str(tmp_path / "scores.safetensors"), criteria=criteria).pruned

    def kept(artifact: Artifact) -> tuple[list[int], list[int], list[int]]:
        plan = json.loads((artifact.path / "plan.json").read_text())
        return plan["ffn"]["0"], plan["heads"]["0"], plan["channels"]

    best, others = pruned(), pruned(ffn="before_activation", heads="per_token_norm", channels="all_norms")
    assert kept(best) == ([*range(arch.ffn - 9, arch.ffn)], [1, 2, 3, 5, 6, 7], [*range(arch.hidden - 30, arch.hidden)])
    assert kept(others) == ([*range(9)], [0, 1, 2, 4, 5, 6], [*range(30)])
    assert [artifact.result["ranked_by"]["heads"]["criterion"] for artifact in (best, others)] == ["per_channel", "per_token_norm"]
    assert prune_model(source, sizes).pruned.result["ranked_by"] == "random"
