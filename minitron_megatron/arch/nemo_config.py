"""model_config.yaml of a .nemo archive ↔ config.json: NeMo 1.x's Megatron GPT, whose fields and defaults these are."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.hf_config import LLAMA3_CONSTANTS
from minitron_megatron.arch.nemo_archive import NemoArchive
from minitron_megatron.errors import ArchitectureError

CONFIG = "model_config.yaml"
TOKENIZER_FOLDER = "tokenizer"
"""Where an archive of ours keeps a Hugging Face tokenizer; NeMo itself keeps only its name."""
MUST_BE: dict[str, tuple[Any, Any]] = {
    # field → (the value that is built here, NeMo's default)
    "bias": (False, True),
    "position_embedding_type": ("rope", "learned_absolute"),
    "transformer_block_type": ("pre_ln", "pre_ln"),
    "attention_type": ("multihead", "multihead"),
    "rotary_interleaved": (False, False),
    "seq_len_interpolation_factor": (None, None),
    "num_moe_experts": (None, None),
    "headscale": (False, False),
}
GATED = ("swiglu", "fast-swiglu")
OWN_CONFIG = "name a config.json of the model with its tokenizer beside it: model.hf_config=FOLDER/config.json"


def config_of_archive(archive: NemoArchive) -> dict[str, Any]:
    """config.json for what the archive's model_config.yaml says; raises ArchitectureError naming the field that does not fit."""
    fields = _fields(archive)
    for field, (expected, default) in MUST_BE.items():
        if fields.get(field, default) != expected:
            found = fields.get(field, default)
            raise ArchitectureError(f"{archive.path}: {CONFIG}: {field}={found!r} is not supported; expected {expected!r}")
    kind = _model_type(fields, archive)
    heads, hidden = _number(fields, "num_attention_heads", archive), _number(fields, "hidden_size", archive)
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": _number(fields, "num_layers", archive),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_query_groups") or heads,
        "head_dim": fields.get("kv_channels") or hidden // max(heads, 1),
        "intermediate_size": _number(fields, "ffn_hidden_size", archive),
        "vocab_size": _vocabulary(fields, archive),
        "max_position_embeddings": _number(
            fields, "max_position_embeddings" if "max_position_embeddings" in fields else "encoder_seq_length", archive
        ),
        "norm_eps" if kind == "nemotron" else "rms_norm_eps": _real(fields, "layernorm_epsilon", 1e-5, archive),
        "hidden_act": "relu2" if kind == "nemotron" else "silu",
        "tie_word_embeddings": bool(fields.get("share_embeddings_and_output_weights", True)),
        "rope_theta": _real(fields, "rotary_base", 10000.0, archive),
        "partial_rotary_factor": _real(fields, "rotary_percentage", 1.0, archive),
        **_rope_scaling(fields, archive),
        **({"sliding_window": _window(fields, archive)} if kind == "mistral" else {}),
        **({"use_sliding_window": False} if kind.startswith("qwen") else {}),
        **_special_tokens(fields, archive),
    }


def nemo_config_for(config: dict[str, Any], arch: Architecture, tokenizer: dict[str, Any], dtype: str) -> dict[str, Any]:
    """model_config.yaml of a model whose config.json this is; tokenizer: its own section. dtype: of the weights, as torch names it."""
    kind = arch.family
    return {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "mcore_gpt": True,
        "transformer_engine": True,
        "dist_ckpt_format": "torch_dist",
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "precision": {"bfloat16": "bf16-mixed", "float16": "16-mixed"}.get(dtype, 32),
        "encoder_seq_length": arch.max_positions,
        "max_position_embeddings": arch.max_positions,
        "num_layers": arch.layers,
        "hidden_size": arch.hidden,
        "ffn_hidden_size": arch.ffn,
        "num_attention_heads": arch.heads,
        "num_query_groups": arch.kv_groups,
        "kv_channels": arch.head_channels,
        "override_vocab_size": arch.vocab,
        "make_vocab_size_divisible_by": _power_of_two(arch.vocab),
        "init_method_std": config.get("initializer_range", 0.02),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "normalization": kind.norm,
        "layernorm_epsilon": arch.norm_eps,
        "bias": False,
        "qkv_bias": kind.qkv_bias,
        "qk_layernorm": kind.qk_norm,
        "activation": "fast-swiglu" if kind.is_gated else "squared-relu",
        "transformer_block_type": "pre_ln",
        "attention_type": "multihead",
        "position_embedding_type": "rope",
        "rotary_percentage": arch.rotary_share,
        "rotary_base": arch.rope_theta,
        **({"scale_positional_embedding": True, "scale_factor": arch.rope_scaling.factor} if arch.rope_scaling else {}),
        **({"window_size": [arch.attention_window, 0]} if arch.attention_window else {}),
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "apply_query_key_layer_scaling": False,
        "tokenizer": tokenizer,
    }


def tokenizer_members(archive: NemoArchive) -> dict[str, str]:
    """Name in the archive → name in a tokenizer's folder; raises ArchitectureError where the archive has none that is read here."""
    own = archive.below(TOKENIZER_FOLDER)
    if own:
        return {name: PurePosixPath(name).name for name in own}
    section = _fields(archive).get("tokenizer") or {}
    model = str(section.get("model") or section.get("tokenizer_model") or "").removeprefix("nemo:")
    if section.get("library") != "sentencepiece" or model not in archive.names:
        held = f"tokenizer library {section.get('library')!r} with model {model!r}"
        raise ArchitectureError(f"{archive.path}: {held} is no SentencePiece model in the archive; {OWN_CONFIG}")
    return {model: "tokenizer.model"}


def _fields(archive: NemoArchive) -> dict[str, Any]:
    """Of model_config.yaml; references to other fields of it are followed, nothing else is evaluated."""
    try:
        loaded = yaml.safe_load(archive.read(CONFIG))
    except yaml.YAMLError as error:
        raise ArchitectureError(f"{archive.path}: {CONFIG} is no plain YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(loaded, dict):
        raise ArchitectureError(f"{archive.path}: {CONFIG} is no mapping, found {type(loaded).__name__}")
    return {name: _referred(loaded, value) for name, value in loaded.items()}


def _referred(fields: dict[str, Any], value: Any) -> Any:
    """`${.encoder_seq_length}` → that field's value."""
    reference = re.fullmatch(r"\$\{(?:\.|model\.)?(\w+)\}", value) if isinstance(value, str) else None
    return fields.get(reference[1]) if reference else value


def _model_type(fields: dict[str, Any], archive: NemoArchive) -> str:
    activation, norm = fields.get("activation", "gelu"), fields.get("normalization", "layernorm")
    if (activation, norm) == ("squared-relu", "layernorm1p"):
        return "nemotron"
    if activation in GATED and norm == "rmsnorm":
        marks = {"qwen3": fields.get("qk_layernorm"), "qwen2": fields.get("qkv_bias"), "mistral": fields.get("window_size")}
        return next((family for family, mark in marks.items() if mark), "llama")
    raise ArchitectureError(
        f"{archive.path}: {CONFIG}: activation={activation!r} with normalization={norm!r} is no known family; "
        "known: squared-relu with layernorm1p, swiglu with rmsnorm"
    )


def _number(fields: dict[str, Any], name: str, archive: NemoArchive) -> int:
    value = fields.get(name)
    if not isinstance(value, int):
        raise ArchitectureError(f"{archive.path}: {CONFIG}: {name} is missing or no whole number (found {value!r})")
    return value


def _real(fields: dict[str, Any], name: str, default: float, archive: NemoArchive) -> float:
    """YAML reads 1e-5 as text."""
    try:
        return float(default if fields.get(name) is None else fields[name])
    except (TypeError, ValueError):
        raise ArchitectureError(f"{archive.path}: {CONFIG}: {name} is no number (found {fields[name]!r})") from None


def _window(fields: dict[str, Any], archive: NemoArchive) -> int:
    """Tokens that each sees to its left."""
    found = fields["window_size"]
    if not isinstance(found, list) or len(found) != 2 or type(found[0]) is not int or found[0] < 1:
        raise ArchitectureError(f"{archive.path}: {CONFIG}: window_size={found!r} is not supported; expected [tokens to the left, 0]")
    return found[0]


def _vocabulary(fields: dict[str, Any], archive: NemoArchive) -> int:
    """Rows of the embedding: NeMo pads them to a multiple, and trains with the padded ones."""
    if isinstance(fields.get("override_vocab_size"), int):
        return int(fields["override_vocab_size"])
    multiple = int(fields.get("make_vocab_size_divisible_by") or 128) * int(fields.get("tensor_model_parallel_size") or 1)
    return -(-_sentencepiece(archive).get_piece_size() // multiple) * multiple


def _special_tokens(fields: dict[str, Any], archive: NemoArchive) -> dict[str, int]:
    if (fields.get("tokenizer") or {}).get("library") != "sentencepiece":
        return {}
    pieces = _sentencepiece(archive)
    found = {"bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    return {name: number for name, number in found.items() if number >= 0}


def _sentencepiece(archive: NemoArchive) -> Any:
    import sentencepiece

    name = next(iter(tokenizer_members(archive)))
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=archive.read(name))
    except RuntimeError:  # of the C++ parser
        raise ArchitectureError(f"{archive.path}: {name} cannot be read as a SentencePiece model; {OWN_CONFIG}") from None


def _rope_scaling(fields: dict[str, Any], archive: NemoArchive) -> dict[str, Any]:
    """NeMo's scaling is that of Llama 3.1, whose other constants it fixes as megatron-core does."""
    if not fields.get("scale_positional_embedding"):
        return {}
    return {"rope_scaling": {"rope_type": "llama3", "factor": _real(fields, "scale_factor", 8.0, archive), **LLAMA3_CONSTANTS}}


def _power_of_two(vocab: int) -> int:
    """The largest that divides the vocabulary, at most NeMo's usual 128: nothing is padded."""
    return min(vocab & -vocab, 128)
