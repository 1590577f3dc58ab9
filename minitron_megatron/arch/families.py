"""Model families as tables: adding a family of this kind is one more row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """What sets one family of pre-norm, rotary decoders apart from the others; by default RMSNorm and a SwiGLU FFN."""

    name: str
    """Hugging Face `model_type`."""
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: Literal["swiglu", "squared_relu"] = "swiglu"
    """Of the FFN: a gated SiLU, whose first matrix is [2F, D], or relu(x)², whose first matrix is [F, D]."""
    norm: Literal["rmsnorm", "layernorm1p"] = "rmsnorm"
    """layernorm1p: LayerNorm whose weight is kept as its distance from 1, with a bias."""
    norm_eps_field: str = "rms_norm_eps"
    default_tied: bool = False
    default_rope_theta: float = 10000.0
    default_norm_eps: float = 1e-6
    default_head_channels: int | None = None
    """`head_dim` where config.json does not name it; None: hidden size / heads."""
    default_rotary_share: float | None = None
    """`partial_rotary_factor` where config.json does not name it; None: the family turns whole heads, and another share is refused."""
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

    @property
    def is_gated(self) -> bool:
        return self.activation == "swiglu"


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
        # Nemotron-4 and Minitron (arXiv 2402.16819; 2407.14679, section 3)
        Family(
            "nemotron",
            activation="squared_relu",
            norm="layernorm1p",
            norm_eps_field="norm_eps",
            default_norm_eps=1e-5,
            default_rotary_share=0.5,
            must_be=(("hidden_act", "relu2"), ("attention_bias", False), ("mlp_bias", False)),
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
