"""Model families as tables: adding a family of this kind is one more row."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_megatron.errors import ArchitectureError


@dataclass(frozen=True)
class ExpertNames:
    """How Hugging Face names the tensors of a layer with experts: `block`.gate, `block`.experts.N.`part`.weight."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """What sets one family of pre-norm, rotary, gated (SwiGLU) decoders apart from the others."""

    name: str
    """Hugging Face `model_type`."""
    qkv_bias: bool = False
    qk_norm: bool = False
    default_tied: bool = False
    default_rope_theta: float = 10000.0
    default_norm_eps: float = 1e-6
    default_head_channels: int | None = None
    """`head_dim` where config.json does not name it; None: hidden size / heads."""
    has_window: bool = False
    """Whether attention slides where config.json names a `sliding_window`."""
    default_window: int | None = None
    """`sliding_window` where config.json does not name it."""
    hidden_multiple_of_heads: bool = False
    """Whether transformers refuses a hidden size that is no multiple of the heads, although head_dim is named."""
    must_be: tuple[tuple[str, object], ...] = ()
    """Fields of config.json that must have this value (or be absent) for the arithmetic to be the one built here."""
    per_layer: tuple[str, ...] = ()
    """Fields of config.json that are lists with an entry per layer: depth pruning cuts them too."""
    ffn_field: str = "intermediate_size"
    """Field of config.json with the width of the FFN, or of one expert."""
    expert_fields: tuple[str, ...] = ()
    """Spellings of the number of experts in config.json, the one that is written first; empty: a dense family."""
    always_normalised: bool = False
    """Whether a token's expert weights sum to 1 whatever config.json says; else `norm_topk_prob` decides."""
    default_experts_per_token: int = 0
    expert_names: ExpertNames | None = None


FAMILIES = {
    row.name: row
    for row in (
        Family(
            "llama",
            hidden_multiple_of_heads=True,
            must_be=(("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)),
        ),
        Family("mistral", has_window=True, default_window=4096, must_be=(("hidden_act", "silu"),)),
        Family(
            "qwen2",
            qkv_bias=True,
            must_be=(("hidden_act", "silu"), ("use_sliding_window", False)),
            per_layer=("layer_types",),
        ),
        Family(
            "qwen3",
            qk_norm=True,
            default_head_channels=128,
            must_be=(("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)),
            per_layer=("layer_types",),
        ),
        Family(
            "mixtral",
            default_rope_theta=1e6,
            default_norm_eps=1e-5,
            has_window=True,
            must_be=(("hidden_act", "silu"),),
            expert_fields=("num_local_experts",),
            always_normalised=True,
            default_experts_per_token=2,
            expert_names=ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2"),
        ),
        Family(
            "qwen3_moe",
            qk_norm=True,
            must_be=(
                ("hidden_act", "silu"),
                ("attention_bias", False),
                ("use_sliding_window", False),
                # a layer without experts among those with them, or an expert that every token meets, has no place in the tables here
                ("mlp_only_layers", []),
                ("decoder_sparse_step", 1),
                ("shared_expert_intermediate_size", 0),
            ),
            ffn_field="moe_intermediate_size",
            expert_fields=("num_experts", "num_local_experts"),
            default_experts_per_token=8,
            expert_names=ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        ),
    )
}


def family(name: str) -> Family:
    """The row of this name; an unknown one is refused with the list of known ones."""
    if name not in FAMILIES:
        raise ArchitectureError(f"unknown model family '{name}'; known families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
