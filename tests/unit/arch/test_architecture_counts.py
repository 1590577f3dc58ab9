"""Parameter counts in closed form, against the papers and against what transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minitron_megatron.arch.architecture import (
    Architecture,
    active_parameter_count,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    layer_costs,
    parameter_count,
    parameters_by_part,
)
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.errors import ArchitectureError

# name → (published parameters, HF family, L, D, H, F, V), arXiv 2408.11796 Tables 2 and 3; G = 8 and K = 128 throughout
PUBLISHED = {
    "Llama-3.1 8B": (8.03e9, "llama", 32, 4096, 32, 14336, 128256),
    "Llama-3.1-Minitron 4B width": (4.51e9, "llama", 32, 3072, 32, 9216, 128256),
    "Llama-3.1-Minitron 4B depth": (4.54e9, "llama", 16, 4096, 32, 14336, 128256),
    "Mistral-NeMo 12B": (12.2e9, "mistral", 40, 5120, 32, 14336, 131072),
    "MN-Minitron 8B": (8.4e9, "mistral", 40, 4096, 32, 11520, 131072),
}


def published(name: str) -> Architecture:
    _, family, layers, hidden, heads, ffn, vocab = PUBLISHED[name]
    return Architecture(family, layers, hidden, heads, 8, 128, ffn, vocab, False, 8192, 1e-5, 500000.0)


def parameters_of_transformers(config: object) -> int:
    """What transformers allocates, tied weights once; nothing is filled, so that 12 billion cost nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    # 1 %: the papers round to two or three digits
    assert parameter_count(published(name)) == pytest.approx(PUBLISHED[name][0], rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_shapes_are_exactly_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig

    arch = published(name)
    config = AutoConfig.for_model(
        arch.family_name,
        num_hidden_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_groups,
        head_dim=arch.head_channels,
        intermediate_size=arch.ffn,
        vocab_size=arch.vocab,
        tie_word_embeddings=False,
    )
    assert parameter_count(arch) == parameters_of_transformers(config)


def test_counts_of_every_family_are_exactly_those_of_transformers(every_family: Path) -> None:
    from transformers import AutoConfig

    arch = source_architecture(str(every_family))
    assert parameter_count(arch) == parameters_of_transformers(AutoConfig.from_pretrained(every_family))
    assert sum(parameters_by_part(arch).values()) == parameter_count(arch)


UNEVEN_WIDTHS = [28, 4, 17]


def test_counts_of_layers_of_different_widths_are_those_of_transformers_with_narrower_ffns(tiny_hf_model: Callable[..., Path]) -> None:
    """transformers' model with its FFNs replaced by narrower ones of its own kind."""
    from copy import deepcopy

    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder, sequence = tiny_hf_model("llama"), 64
    arch = source_architecture(str(folder)).resized(ffn=UNEVEN_WIDTHS)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    flops = []
    for widths in ([arch.ffn] * 3, UNEVEN_WIDTHS):
        for layer, width in zip(model.model.layers, widths, strict=True):
            config = deepcopy(model.config)
            config.intermediate_size = width
            layer.mlp = type(layer.mlp)(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, sequence, dtype=torch.long))
        flops.append(counter.get_total_flops())
    assert parameter_count(arch) == sum(weight.numel() for weight in model.parameters()) == sum(parameters_by_part(arch).values())
    whole = arch.resized(ffn=arch.ffn)
    assert (forward_flops_per_token(whole, sequence) - forward_flops_per_token(arch, sequence)) * sequence == flops[0] - flops[1]
    narrow = [cost - other for cost, other in zip(layer_costs(whole), layer_costs(arch), strict=True)]
    assert narrow == [3 * arch.hidden * (arch.ffn - width) for width in UNEVEN_WIDTHS]
    assert kv_cache_bytes_per_token(whole) == kv_cache_bytes_per_token(arch)


@pytest.mark.parametrize(("widths", "what"), [([28, 4], "2 widths for 3 layers"), ([30, 0, 4], "different widths ≥ 1")])
def test_widths_that_no_model_has_are_refused(widths: list[int], what: str, tiny_hf_model: Callable[..., Path]) -> None:
    with pytest.raises(ArchitectureError, match=what):
        source_architecture(str(tiny_hf_model("llama"))).resized(ffn=widths)
    with pytest.raises(ArchitectureError, match="layers with experts have one width"):
        source_architecture(str(tiny_hf_model("mixtral"))).resized(ffn=UNEVEN_WIDTHS)


# name → (parameters, active parameters, family, L, D, H, G, F, V, E, experts a token): the models' own announcements
PUBLISHED_EXPERTS = {
    "Mixtral-8x7B": (46.7e9, 12.9e9, "mixtral", 32, 4096, 32, 8, 14336, 32000, 8, 2),
    "Qwen3-30B-A3B": (30.5e9, 3.3e9, "qwen3_moe", 48, 2048, 32, 4, 768, 151936, 128, 8),
}


@pytest.mark.parametrize("name", PUBLISHED_EXPERTS)
def test_counts_of_models_with_experts_are_the_published_ones_and_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig

    total, active, family, *sizes = PUBLISHED_EXPERTS[name]
    layers, hidden, heads, groups, ffn, vocab, experts, per_token = sizes
    arch = Architecture(family, layers, hidden, heads, groups, 128, ffn, vocab, False, 8192, 1e-6, 1e6, None, None, experts, per_token, True)
    # published to the first digit behind the point
    assert parameter_count(arch) == pytest.approx(total, abs=0.06e9)
    assert active_parameter_count(arch) == pytest.approx(active, abs=0.06e9)
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=128,
        **({"moe_intermediate_size": ffn, "num_experts": experts} if family == "qwen3_moe" else {"intermediate_size": ffn}),
        vocab_size=vocab,
    )
    assert parameter_count(arch) == parameters_of_transformers(config)


def test_a_dense_model_is_active_as_a_whole_and_a_model_with_experts_by_those_of_a_token(every_family: Path) -> None:
    arch = source_architecture(str(every_family))
    idle = arch.layers * (arch.experts - arch.experts_per_token) * 3 * arch.hidden * arch.ffn
    assert active_parameter_count(arch) == parameter_count(arch) - idle


def test_flops_are_those_that_torch_counts(tiny_hf_model: Callable[..., Path]) -> None:
    """Matrices of a forward pass and the causal half of attention, against torch's own counter on the transformers model."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder, sequence = tiny_hf_model("llama"), 64
    arch = source_architecture(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, sequence, dtype=torch.long))
    heads_and_channels = arch.layers * arch.heads * arch.head_channels
    # eager attention multiplies all S × S pairs; ours counts S / 2 pairs a token, as a causal kernel does
    full_attention = 2 * 2 * heads_and_channels * sequence * sequence
    expected = counter.get_total_flops() - full_attention // 2
    assert forward_flops_per_token(arch, sequence) * sequence == expected


def test_kv_cache_bytes_are_those_of_a_cache_that_transformers_fills(tiny_hf_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder, tokens = tiny_hf_model("llama"), 5
    cache = AutoModelForCausalLM.from_pretrained(folder)(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes_per_token(source_architecture(str(folder)), bytes_per_value=4) * tokens == held
