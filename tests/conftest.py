"""What every test stands on: CPU megatron before its first import, one process's groups, and tiny Hugging Face models in awkward shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from minitron_megatron.platform import activate

PLATFORM = activate("cpu")

# 4 heads in each of 2 groups, so that a layout that swaps the two shows; head_dim is not hidden / heads; nothing is a power of two but K
AWKWARD = {
    "num_hidden_layers": 3,
    "hidden_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 28,
    "vocab_size": 131,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
# with this base and head_dim 6 the slowest channel's wavelength is beyond 8192 positions, so that the scaling changes it
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 80000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 512},
    "qwen2": {"max_window_layers": 3},
    "qwen3": {"max_window_layers": 3},
    "nemotron": {"partial_rotary_factor": 0.67},  # 4 of the 6 channels turn; the default half of them is no number of pairs
}
# numbers of experts that are no power of two; the width that qwen3_moe names for layers without experts is not to be taken for theirs
EXPERT_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 512},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False, "moe_intermediate_size": 28, "intermediate_size": 99},
    "qwen3_moe_normalised": {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 28},
}
MODEL_TYPES = {"llama3": "llama", "qwen3_moe_normalised": "qwen3_moe"}
VARIANTS = [(family, tied) for family in FAMILY_SIZES for tied in (False, True)]
EXPERT_VARIANTS = [("mixtral", False), ("qwen3_moe", False), ("qwen3_moe_normalised", True)]
VARIANTS += EXPERT_VARIANTS


@pytest.fixture(params=VARIANTS, ids=[f"{family}-{'tied' if tied else 'untied'}" for family, tied in VARIANTS])
def every_family(request: pytest.FixtureRequest, tiny_hf_model: Callable[..., Path]) -> Path:
    """A Hugging Face folder of each family, with embeddings tied and untied; not to be changed."""
    family, tied = request.param
    return tiny_hf_model(family, tie_word_embeddings=tied)


@pytest.fixture(scope="session")
def tiny_hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_hf_model(family, **config fields): a folder with random weights and a tokenizer, made once a session; copy it to change it.

    Families: llama, llama3 (llama with its rope scaling), mistral, qwen2, qwen3, nemotron, and those of EXPERT_SIZES.
    """
    made: dict[str, Path] = {}

    def make(family: str, **sizes: Any) -> Path:
        key = json.dumps([family, sizes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            _save_model(made[key], family, sizes)
            _save_tokenizer(made[key])
        return made[key]

    return make


def _save_model(folder: Path, family: str, sizes: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(MODEL_TYPES.get(family, family), **{**AWKWARD, **{**FAMILY_SIZES, **EXPERT_SIZES}[family], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(20240719)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # biases away from 0 and norms away from 1, or a test would not see them lost
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else noise * (0.3 if weight.dim() == 1 else 0.2))
    model.save_pretrained(folder)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "the state of our union is strong and the people of every county have built it with work"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([text] * 3, trainers.BpeTrainer(vocab_size=64, special_tokens=["<eos>"], show_progress=False))
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """A process group of this process alone, for the tests of one module."""
    from minitron_megatron.parallel.world import distributed_world

    with distributed_world(PLATFORM) as one_process:
        yield one_process


@pytest.fixture
def make_layout(world: Any) -> Iterator[Callable[..., Any]]:
    """make_layout(**parallel): megatron's global groups made anew at each call, and forgotten after the test."""
    from minitron_megatron.config.parallel import Parallel
    from minitron_megatron.parallel.layout import destroy_layout, global_layout

    def make(**parallel: Any) -> Any:
        destroy_layout()
        return global_layout(Parallel(**parallel), world)

    yield make
    destroy_layout()


@pytest.fixture
def layout(make_layout: Callable[..., Any]) -> Any:
    """The Layout of one process: every group has one rank."""
    return make_layout()
