"""config.json of published models, the fields that fix shapes and arithmetic as their authors wrote them, and the parameters announced.

Those that a recipe starts from lie in configs/architectures, where the recipes read them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Published = tuple[float, dict[str, Any]]
ARCHITECTURES = Path(__file__).parents[3] / "configs" / "architectures"


def source(name: str) -> dict[str, Any]:
    return json.loads((ARCHITECTURES / f"{name}.json").read_text())


def llama(layers: int, hidden: int, heads: int, ffn: int, *, factor: float = 8.0, tied: bool = False, head_dim: int | None = None) -> dict[str, Any]:
    """Llama 3.1 and 3.2, and what was pruned out of 3.1."""
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        **({"head_dim": head_dim} if head_dim else {}),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    }


def mistral_nemo(hidden: int, ffn: int) -> dict[str, Any]:
    """Heads of 128 channels although hidden / heads is 160; no window."""
    return {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 128000,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 131072,
    }


def nemotron(hidden: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["NemotronForCausalLM"],
        "bos_token_id": 2,
        "eos_token_id": 3,
        "hidden_act": "relu2",
        "hidden_size": hidden,
        "initializer_range": 0.0134,
        "intermediate_size": ffn,
        "max_position_embeddings": 4096,
        "model_type": "nemotron",
        "num_attention_heads": heads,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "norm_eps": 1e-05,
        "rope_theta": 10000,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 256000,
        **more,
    }


def qwen(model_type: str, layers: int, hidden: int, heads: int, groups: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_window_layers": layers,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        **more,
    }


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "rope_scaling": None, "sliding_window": None}

PUBLISHED: dict[str, Published] = {
    "Llama-3.1-8B": (8.03e9, source("llama31_8b")),
    "Llama-3.2-1B": (1.24e9, llama(16, 2048, 32, 8192, factor=32.0, tied=True, head_dim=64)),
    "Llama-3.2-3B": (3.21e9, llama(28, 3072, 24, 8192, factor=32.0, tied=True, head_dim=128)),
    "Llama-3.1-Minitron-4B-Width-Base": (4.51e9, llama(32, 3072, 32, 9216, head_dim=128)),
    "Llama-3.1-Minitron-4B-Depth-Base": (4.54e9, llama(16, 4096, 32, 14336)),
    "Mistral-Nemo-Base-2407": (12.2e9, source("mistral_nemo_12b")),
    "Mistral-NeMo-Minitron-8B-Base": (8.4e9, mistral_nemo(4096, 11520)),
    # of arXiv 2402.16819, section 2; a config.json of it was not published
    "Nemotron-4-15B": (15.6e9, source("nemotron4_15b")),
    "Minitron-8B-Base": (8.27e9, source("minitron_8b")),
    "Minitron-4B-Base": (4.19e9, nemotron(3072, 24, 9216, head_dim=128, attention_bias=False, mlp_bias=False)),
    "Qwen2.5-7B": (7.62e9, qwen("qwen2", 28, 3584, 28, 4, 18944, max_position_embeddings=131072, sliding_window=131072, vocab_size=152064)),
    "Qwen3-0.6B": (
        0.596e9,
        qwen("qwen3", 28, 1024, 16, 8, 3072, **QWEN3, max_position_embeddings=40960, vocab_size=151936) | {"tie_word_embeddings": True},
    ),
    "Qwen3-8B": (8.19e9, source("qwen3_8b")),
}
