"""Model families as tables: adding a family of this kind is one more row."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_megatron.errors import ArchitectureError


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
    default_window: int | None = None
    """`sliding_window` where config.json does not name it."""
    hidden_multiple_of_heads: bool = False
    """Whether transformers refuses a hidden size that is no multiple of the heads, although head_dim is named."""
    must_be: tuple[tuple[str, object], ...] = ()
    """Fields of config.json that must have this value (or be absent) for the arithmetic to be the one built here."""
    per_layer: tuple[str, ...] = ()
    """Fields of config.json that are lists with an entry per layer: depth pruning cuts them too."""


FAMILIES = {
    row.name: row
    for row in (
        Family(
            "llama",
            hidden_multiple_of_heads=True,
            must_be=(("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)),
        ),
        Family("mistral", default_window=4096, must_be=(("hidden_act", "silu"),)),
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
    )
}


def family(name: str) -> Family:
    """The row of this name; an unknown one is refused with the list of known ones."""
    if name not in FAMILIES:
        raise ArchitectureError(f"unknown model family '{name}'; known families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
