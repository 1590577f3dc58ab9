"""config.json files as published are read, whatever transformers release wrote them, and give the announced numbers of parameters."""

from __future__ import annotations

import pytest
from published_configs import PUBLISHED
from test_architecture_counts import parameters_of_transformers

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.arch.hf_config import architecture_from_hf, hf_config_for


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_announced_ones_and_exactly_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig

    announced, config = PUBLISHED[name]
    count = parameter_count(architecture_from_hf(config))
    assert count == pytest.approx(announced, rel=0.01)  # announced in two or three digits
    fields = {field: value for field, value in config.items() if field not in ("model_type", "architectures")}
    assert count == parameters_of_transformers(AutoConfig.for_model(config["model_type"], **fields))


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_not_a_size_is_what_transformers_reads(name: str) -> None:
    from transformers import AutoConfig

    config = PUBLISHED[name][1]
    fields = {field: value for field, value in config.items() if field not in ("model_type", "architectures")}
    arch, theirs = architecture_from_hf(config), AutoConfig.for_model(config["model_type"], **fields)
    rope = theirs.rope_parameters
    assert (arch.rope_theta, arch.rotary_share) == (rope["rope_theta"], rope.get("partial_rotary_factor", 1.0))
    assert (arch.rope_scaling.factor if arch.rope_scaling else None) == (rope["factor"] if rope["rope_type"] == "llama3" else None)
    assert arch.head_channels == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (arch.max_positions, arch.tied_embeddings) == (theirs.max_position_embeddings, theirs.tie_word_embeddings)
    assert arch.attention_window is None
    assert arch.norm_eps == config.get("norm_eps", config.get("rms_norm_eps"))


PRUNED = {
    "Minitron-8B-Base": ("Nemotron-4-15B", {"hidden": 4096, "ffn": 16384}),
    "Minitron-4B-Base": ("Minitron-8B-Base", {"hidden": 3072, "heads": 24, "ffn": 9216}),
    "Llama-3.1-Minitron-4B-Width-Base": ("Llama-3.1-8B", {"hidden": 3072, "ffn": 9216}),
    "Llama-3.1-Minitron-4B-Depth-Base": ("Llama-3.1-8B", {"layers": 16}),
    "Mistral-NeMo-Minitron-8B-Base": ("Mistral-Nemo-Base-2407", {"hidden": 4096, "ffn": 11520}),
}


@pytest.mark.parametrize("name", PRUNED)
def test_the_published_cuts_lead_to_the_published_configs(name: str) -> None:
    """What export writes for the papers' targets is read as the published student's own config.json is."""
    origin, sizes = PRUNED[name]
    source: Architecture = architecture_from_hf(PUBLISHED[origin][1])
    target = source.resized(**sizes)
    written = hf_config_for(PUBLISHED[origin][1], list(range(target.layers)), target)
    assert architecture_from_hf(written) == architecture_from_hf(PUBLISHED[name][1]) == target
