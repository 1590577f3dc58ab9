"""Hugging Face config.json ↔ Architecture."""

from __future__ import annotations

from typing import Any

from minitron_megatron.arch.architecture import Architecture, RopeScaling
from minitron_megatron.arch.families import Family, family
from minitron_megatron.errors import ArchitectureError

# Architecture field → config.json field, for the sizes that pruning changes
SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "head_channels": "head_dim",
    "ffn": "intermediate_size",
}
"""Of a dense family; `_size_fields` knows a family's own names."""
REASONS = {
    "mlp_only_layers": "every layer has to have experts",
    "decoder_sparse_step": "every layer has to have experts",
    "shared_expert_intermediate_size": "shared experts are not built here",
}
WIDTHS = "ffn_per_layer"
"""Our own field of the hf_config.json beside a checkpoint whose layers have FFNs of different widths; transformers' families have none for it."""
LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """Reads config.json of a known family; raises ArchitectureError naming the field that does not fit."""
    kind = family(str(config.get("model_type")))
    _refuse_other_arithmetic(config, kind)
    heads = _required(config, "num_attention_heads")
    hidden = _required(config, "hidden_size")
    widths = config.get(WIDTHS)
    return Architecture(
        family_name=kind.name,
        layers=_required(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_groups=_whole(config, "num_key_value_heads") or heads,
        head_channels=_whole(config, "head_dim") or kind.default_head_channels or hidden // max(heads, 1),
        ffn=_required(config, kind.ffn_field),
        vocab=_required(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", kind.default_tied)),
        max_positions=_whole(config, "max_position_embeddings") or 2048,
        norm_eps=_number(config, kind.norm_eps_field) or kind.default_norm_eps,
        rope_theta=_rope_theta(config, kind),
        rope_scaling=_rope_scaling(config),
        attention_window=_attention_window(config, kind),
        rotary_share=_rotary_share(config, kind),
        ffn_per_layer=tuple(widths) if widths else None,
        **_experts(config, kind),
    )


def hf_config_for(source_config: dict[str, Any], kept_layers: list[int], arch: Architecture) -> dict[str, Any]:
    """config.json of a pruned model: the source's own, with the sizes of arch and the kept layers' entries.

    head_dim is always written: after width pruning it is no longer hidden / heads. Where widths differ the result is for us alone (WIDTHS).
    """
    config = {field: value for field, value in source_config.items() if field != WIDTHS}
    if arch.ffn_per_layer:
        config[WIDTHS] = list(arch.ffn_per_layer)
    config.update({theirs: getattr(arch, ours) for ours, theirs in _size_fields(arch.family).items()})
    for field in _expert_fields(config, arch.family):
        config[field] = arch.experts
    for field in arch.family.per_layer:
        if isinstance(config.get(field), list):
            config[field] = [config[field][layer] for layer in kept_layers]
    if "max_window_layers" in config:
        config["max_window_layers"] = arch.layers
    return config


def _size_fields(kind: Family) -> dict[str, str]:
    return {**SIZES, "ffn": kind.ffn_field}


def _expert_fields(config: dict[str, Any], kind: Family) -> list[str]:
    """The spellings that this config.json uses; the first one where it uses none."""
    return [field for field in kind.expert_fields if field in config] or list(kind.expert_fields[:1])


def _experts(config: dict[str, Any], kind: Family) -> dict[str, Any]:
    """Fields of Architecture that dense families leave at their defaults."""
    if not kind.expert_fields:
        return {}
    per_token = _whole(config, "num_experts_per_tok")
    return {
        "experts": _required(config, _expert_fields(config, kind)[0]),
        "experts_per_token": kind.default_experts_per_token if per_token is None else per_token,
        "normalised_routing": kind.always_normalised or bool(config.get("norm_topk_prob", False)),
    }


def _required(config: dict[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int:
        raise ArchitectureError(f"config.json: {field} is missing or no whole number (found {value!r})")
    return value


def _whole(config: dict[str, Any], field: str) -> int | None:
    """None where it is absent or null; raises ArchitectureError for what is no whole number."""
    return None if config.get(field) is None else _required(config, field)


def _number(config: dict[str, Any], field: str) -> float | None:
    """None where it is absent or null; raises ArchitectureError for what is no number above 0."""
    value = config.get(field)
    if value is not None and (type(value) not in (int, float) or not value > 0):
        raise ArchitectureError(f"config.json: {field} is no number above 0 (found {value!r})")
    return None if value is None else float(value)


def _refuse_other_arithmetic(config: dict[str, Any], kind: Family) -> None:
    for field, expected in kind.must_be:
        if config.get(field, expected) not in (expected, None):
            raise ArchitectureError(
                f"config.json: {field}={config[field]!r} of family '{kind.name}' is not supported; expected {expected!r}{_reason(field)}"
            )


def _reason(field: str) -> str:
    return f" ({REASONS[field]})" if field in REASONS else ""


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_scaling` + `rope_theta` (before)."""
    found: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(field) or {}, dict):
            raise ArchitectureError(f"config.json: {field} is no mapping (found {config[field]!r})")
        found |= config.get(field) or {}
    return found


def _rotary_share(config: dict[str, Any], kind: Family) -> float:
    """Share of a head's channels that turn; raises ArchitectureError where the family's own arithmetic knows no share."""
    named = _number(_rope(config), "partial_rotary_factor") or _number(config, "partial_rotary_factor")
    share = named or kind.default_rotary_share or 1.0
    if kind.default_rotary_share is None and share != 1.0:
        raise ArchitectureError(f"config.json: partial_rotary_factor={named} of family '{kind.name}' is not supported; expected 1.0")
    if share > 1:
        raise ArchitectureError(f"config.json: partial_rotary_factor={named} is no share of a head's channels; expected above 0 and at most 1")
    return share


def _rope_theta(config: dict[str, Any], kind: Family) -> float:
    return _number(_rope(config), "rope_theta") or _number(config, "rope_theta") or kind.default_rope_theta


def _attention_window(config: dict[str, Any], kind: Family) -> int | None:
    """Of the families that slide; the others' use of it is refused by their row."""
    if not kind.has_window:
        return None
    return _whole(config, "sliding_window") if "sliding_window" in config else kind.default_window


def _rope_scaling(config: dict[str, Any]) -> RopeScaling | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ArchitectureError(f"config.json: rotary scaling '{kind}' is not supported; known: default, llama3")
    for field, expected in LLAMA3_CONSTANTS.items():
        if float(rope.get(field, expected)) != expected:
            raise ArchitectureError(f"config.json: rotary scaling {field}={rope[field]} is not supported; megatron-core fixes it at {expected}")
    if not isinstance(rope.get("factor"), (int, float)):
        raise ArchitectureError(f"config.json: rotary scaling llama3 needs a factor (found {rope.get('factor')!r})")
    return RopeScaling(factor=float(rope["factor"]))
