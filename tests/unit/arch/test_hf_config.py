"""config.json ↔ Architecture: what is read, what is written back, and what is refused because its arithmetic is another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.arch.architecture import Architecture, RopeScaling
from minitron_megatron.arch.families import FAMILIES
from minitron_megatron.arch.hf_config import architecture_from_hf, hf_config_for
from minitron_megatron.arch.source import source_architecture, source_config
from minitron_megatron.errors import ArchitectureError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 28,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
SIZES_OF_EXPERTS: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 28},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def refusal(**fields: Any) -> str:
    with pytest.raises(ArchitectureError) as caught:
        architecture_from_hf({**LLAMA, **fields})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def norm_eps(config: Any) -> float:
    return config.norm_eps if config.model_type == "nemotron" else config.rms_norm_eps


def test_the_architecture_is_what_transformers_reads_of_the_same_folder(every_family: Path) -> None:
    from transformers import AutoConfig

    config, arch = AutoConfig.from_pretrained(every_family), source_architecture(str(every_family))
    assert arch.family_name == config.model_type
    assert (arch.layers, arch.hidden, arch.ffn, arch.vocab) == (3, 40, 28, 131)
    assert (arch.heads, arch.kv_groups, arch.head_channels, arch.heads_per_group) == (8, 2, 6, 4)
    assert arch.tied_embeddings == config.tie_word_embeddings
    assert (arch.max_positions, arch.norm_eps) == (config.max_position_embeddings, norm_eps(config))
    assert arch.rope_theta == config.rope_parameters["rope_theta"]
    assert arch.rotary_share == config.rope_parameters.get("partial_rotary_factor", 1.0)
    assert (arch.rope_scaling is not None) == (config.rope_parameters["rope_type"] == "llama3")
    assert arch.attention_window == (config.sliding_window if config.model_type in ("mistral", "mixtral") else None)
    assert (arch.experts, arch.experts_per_token) == (getattr(config, "num_experts", 0), getattr(config, "num_experts_per_tok", 0))
    assert arch.normalised_routing == getattr(config, "norm_topk_prob", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_config_json_leaves_out_have_transformers_defaults(family: str) -> None:
    """Old config.json files leave out what is at its default in that family, and transformers fills it in."""
    from transformers import AutoConfig

    sizes = {key: value for key, value in LLAMA.items() if key not in ("rms_norm_eps", "model_type", "max_position_embeddings")}
    sizes |= SIZES_OF_EXPERTS.get(family, {})
    sizes |= {"hidden_size": 64} if family == "nemotron" else {}  # half of the channels of a head are pairs
    theirs, ours = AutoConfig.for_model(family, **sizes), architecture_from_hf({**sizes, "model_type": family})
    assert (ours.experts, ours.experts_per_token) == (getattr(theirs, "num_experts", 0), getattr(theirs, "num_experts_per_tok", 0))
    assert ours.norm_eps == norm_eps(theirs)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rotary_share == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.attention_window == (theirs.sliding_window if family == "mistral" else None)
    assert ours.max_positions <= theirs.max_position_embeddings  # never more than the model has
    assert ours.head_channels == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


def test_both_spellings_of_the_rotary_embedding_are_the_same_architecture() -> None:
    before = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    oldest = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
    now = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}
    expected = RopeScaling(factor=8.0)
    for config in (before, oldest, now):
        arch = architecture_from_hf(config)
        assert (arch.rope_scaling, arch.rope_theta) == (expected, 500000.0)
    plain = [{**LLAMA, "rope_theta": 5e5, "rope_scaling": None}, {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
    assert {architecture_from_hf(config).rope_scaling for config in plain} == {None}
    assert {architecture_from_hf(config).rope_theta for config in plain} == {5e5}


def test_an_unknown_family_is_refused_with_the_list() -> None:
    assert (
        refusal(model_type="gpt_neox")
        == "unknown model family 'gpt_neox'; known families: llama, mistral, mixtral, nemotron, qwen2, qwen3, qwen3_moe"
    )
    assert "known families" in refusal(model_type=None)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
def test_other_rotary_scalings_are_refused_in_both_spellings(kind: str, spelling: str) -> None:
    for name in ("rope_type", "type"):
        assert refusal(**{spelling: {name: kind, "factor": 2.0}}) == f"config.json: rotary scaling '{kind}' is not supported; known: default, llama3"


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("field", "value"), [("low_freq_factor", 2.0), ("high_freq_factor", 8.0), ("original_max_position_embeddings", 4096)])
def test_llama3_constants_that_megatron_fixes_are_refused_where_they_differ(field: str, value: float, spelling: str) -> None:
    scaling = {"rope_type": "llama3", **LLAMA3, field: value}
    assert f"rotary scaling {field}={value} is not supported" in refusal(**{spelling: scaling})


def test_llama3_without_its_factor_is_refused() -> None:
    assert "factor" in refusal(rope_scaling={"rope_type": "llama3", **{key: LLAMA3[key] for key in LLAMA3 if key != "factor"}})


@pytest.mark.parametrize("spelling", ["partial_rotary_factor", "rope_parameters"])
def test_a_partial_rotary_embedding_is_refused(spelling: str) -> None:
    value: Any = 0.5 if spelling == "partial_rotary_factor" else {"rope_type": "default", "partial_rotary_factor": 0.5}
    assert "partial_rotary_factor" in refusal(**{spelling: value})


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("mistral", "hidden_act", "relu"),
        ("qwen2", "use_sliding_window", True),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "attention_bias", True),
        ("nemotron", "hidden_act", "silu"),
        ("nemotron", "attention_bias", True),
        ("nemotron", "mlp_bias", True),
    ],
)
def test_other_arithmetic_is_refused_with_the_field(family: str, field: str, value: Any) -> None:
    assert refusal(model_type=family, **{field: value}).startswith(f"config.json: {field}={value!r} of family '{family}' is not supported")


@pytest.mark.parametrize(("field", "value"), [("mlp_only_layers", [1]), ("decoder_sparse_step", 2), ("shared_expert_intermediate_size", 64)])
def test_layers_without_experts_and_shared_experts_are_refused_with_the_reason(field: str, value: Any) -> None:
    message = refusal(model_type="qwen3_moe", **SIZES_OF_EXPERTS["qwen3_moe"], **{field: value})
    assert message.startswith(f"config.json: {field}={value!r} of family 'qwen3_moe' is not supported; expected ")
    assert message.endswith(("(every layer has to have experts)", "(shared experts are not built here)"))


def test_both_spellings_of_the_number_of_experts_are_read_and_written_back_as_they_were() -> None:
    """Published models say num_experts, transformers 5 writes num_local_experts."""
    for field in ("num_experts", "num_local_experts"):
        config = {**LLAMA, "model_type": "qwen3_moe", "moe_intermediate_size": 28, field: 12}
        arch = architecture_from_hf(config)
        assert arch.experts == 12
        pruned = hf_config_for(config, [0, 1, 2], arch.resized(experts=9))
        assert {key: pruned[key] for key in pruned if "experts" in key} == {field: 9}


@pytest.mark.parametrize(("per_token", "what"), [(0, "at least 1"), (9, "at most experts=8"), (1, "cannot be trained")])
def test_numbers_of_experts_that_make_no_router_are_refused(per_token: int, what: str) -> None:
    assert what in refusal(model_type="mixtral", **SIZES_OF_EXPERTS["mixtral"], num_experts_per_tok=per_token)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, "40", 4.5])
def test_a_size_that_is_missing_or_no_whole_number_is_named(field: str, value: Any) -> None:
    assert f"config.json: {field} is missing or no whole number" in refusal(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", "2"),
        ("head_dim", 8.0),
        ("max_position_embeddings", "64"),
        ("rms_norm_eps", "small"),
        ("rope_theta", -1),
        ("partial_rotary_factor", "half"),
        ("rope_scaling", "linear"),
        ("vocab_size", True),
    ],
)
def test_an_optional_field_of_another_type_is_named(field: str, value: Any) -> None:
    assert refusal(**{field: value}).startswith(f"config.json: {field} is ")


def test_a_field_that_is_null_is_at_its_default() -> None:
    fields = dict.fromkeys(("max_position_embeddings", "rms_norm_eps", "head_dim", "num_key_value_heads", "rope_scaling"))
    without = {name: value for name, value in LLAMA.items() if name not in fields}
    assert architecture_from_hf({**LLAMA, **fields}) == architecture_from_hf(without)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": 0},
        {"vocab_size": -1},
        {"num_key_value_heads": 16},
        {"head_dim": 5},
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes: dict[str, int]) -> None:
    assert refusal(**sizes).startswith("architecture: ")


def test_a_sliding_window_limits_mistral_and_is_absent_where_config_json_says_null() -> None:
    mistral = {**LLAMA, "model_type": "mistral"}
    assert architecture_from_hf({**mistral, "sliding_window": 128}).attention_window == 128
    assert architecture_from_hf({**mistral, "sliding_window": None}).attention_window is None
    assert architecture_from_hf({**LLAMA, "model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}).attention_window is None


def test_a_config_goes_round_and_comes_back_the_same(every_family: Path) -> None:
    config = source_config(str(every_family))
    arch = architecture_from_hf(config)
    assert hf_config_for(config, list(range(arch.layers)), arch) == config
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_a_pruned_config_is_read_back_as_the_pruned_architecture(every_family: Path) -> None:
    config = source_config(str(every_family))
    source = architecture_from_hf(config)
    target = source.resized(layers=2, hidden=30, heads=6, ffn=20, experts=max(source.experts - 1, 0))
    pruned = hf_config_for(config, [0, 2], target)
    assert architecture_from_hf(pruned) == target
    untouched = {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "layer_types", "max_window_layers"}
    untouched |= {"moe_intermediate_size", "num_experts", "num_local_experts"}
    assert "moe_intermediate_size" not in config or pruned["intermediate_size"] == config["intermediate_size"]
    assert {key for key in config if pruned[key] != config[key]} <= untouched


def test_head_dim_is_written_even_where_the_source_left_it_out() -> None:
    arch = architecture_from_hf(LLAMA)
    assert hf_config_for(LLAMA, [0, 1, 2], arch.resized(hidden=32))["head_dim"] == 6  # 48 / 8, no longer 32 / 8


def test_entries_of_kept_layers_are_taken_not_the_first_ones() -> None:
    config = {**LLAMA, "model_type": "qwen2", "layer_types": ["a", "b", "c"], "max_window_layers": 3}
    pruned = hf_config_for(config, [0, 2], architecture_from_hf(config).resized(layers=2))
    assert (pruned["layer_types"], pruned["max_window_layers"]) == (["a", "c"], 2)


def test_a_folder_without_a_readable_config_is_one_line(tmp_path: Path, tiny_hf_model: Callable[..., Path]) -> None:
    for text, expected in ((None, "not found"), ("{", "no valid JSON"), ("[1]", "expected a mapping")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ArchitectureError, match=expected):
            source_architecture(str(tmp_path))
    (tmp_path / "config.json").unlink()  # a Megatron checkpoint has none of its own
    assert source_architecture(str(tmp_path), str(tiny_hf_model("qwen2") / "config.json")).family_name == "qwen2"
