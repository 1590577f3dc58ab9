"""The shape of a model, and what follows from it in closed form.

Legend: L layers, D hidden, H query heads, G key/value groups, K head channels, F ffn, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from minitron_megatron.arch.families import Family, family
from minitron_megatron.errors import ArchitectureError


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 rotary scaling; megatron-core fixes the other three constants at 1, 4 and 8192."""

    factor: float


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes and the arithmetic of one decoder-only transformer."""

    family_name: str
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head_channels: int
    ffn: int
    vocab: int
    tied_embeddings: bool
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_window: int | None = None
    """Sliding window of attention; up to this length attention is plain causal, beyond it sequences are refused."""
    experts: int = 0
    """Experts of every layer, of which `ffn` is the width of one; 0: one dense FFN."""
    experts_per_token: int = 0
    normalised_routing: bool = True
    """Whether the weights of a token's chosen experts sum to 1, or are their shares in a softmax over all experts."""
    rotary_share: float = 1.0
    """Share of a head's channels that the rotary embedding turns: the first ones, the others pass."""
    ffn_per_layer: tuple[int, ...] | None = None
    """Widths of the layers' FFNs where they differ, of which `ffn` is the largest; None: all have `ffn`."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_groups", "head_channels", "ffn", "vocab"):
            if getattr(self, name) < 1:
                raise ArchitectureError(f"architecture: {name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_groups:
            raise ArchitectureError(
                f"architecture: heads={self.heads} is not divisible by kv_groups={self.kv_groups}; "
                f"nearest: {nearest_multiples(self.heads, self.kv_groups)}"
            )
        self._check_experts()
        self._check_widths()
        if self.rotary_channels % 2 or self.rotary_channels < 2:
            turned = "" if self.rotary_share == 1 else f" × rotary_share={self.rotary_share} = {self.rotary_channels}"
            raise ArchitectureError(f"architecture: head_channels={self.head_channels}{turned} is odd, but the rotary embedding turns pairs")

    def _check_experts(self) -> None:
        if not self.experts:
            return
        if not 1 <= self.experts_per_token <= self.experts:
            raise ArchitectureError(f"architecture: experts_per_token={self.experts_per_token} must be at least 1 and at most experts={self.experts}")
        if self.experts_per_token == 1 and self.normalised_routing:
            raise ArchitectureError("architecture: with experts_per_token=1 normalised router weights are all 1, and the router cannot be trained")

    def _check_widths(self) -> None:
        widths = self.ffn_per_layer
        if widths is None:
            return
        if self.experts:
            raise ArchitectureError("architecture: layers with experts have one width; leave ffn_per_layer out")
        if len(widths) != self.layers:
            raise ArchitectureError(f"architecture: ffn_per_layer has {len(widths)} widths for {self.layers} layers; give one for each")
        if min(widths) < 1 or max(widths) != self.ffn or len(set(widths)) == 1:
            raise ArchitectureError(f"architecture: ffn_per_layer={list(widths)} needs different widths ≥ 1, of which ffn={self.ffn} is the largest")

    @property
    def family(self) -> Family:
        return family(self.family_name)

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.kv_groups

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that the rotary embedding turns."""
        return int(self.head_channels * self.rotary_share)

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused QKV weight: every group's queries, then its key, then its value."""
        return (self.heads + 2 * self.kv_groups) * self.head_channels

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """[L] the width of every layer's FFN, or of each of its experts."""
        return self.ffn_per_layer or (self.ffn,) * self.layers

    def ffn_width(self, layer: int) -> int:
        """ffn_widths[layer], without the list of all layers: tables ask for every tensor of every layer."""
        return self.ffn_per_layer[layer] if self.ffn_per_layer else self.ffn

    def resized(self, *, ffn: int | Sequence[int] | None = None, **sizes: int) -> Architecture:
        """The same family with other sizes, for example resized(ffn=1024, layers=26); ffn may be a width for each layer."""
        if ffn is None:
            return replace(self, **sizes)  # type: ignore[arg-type]  # only sizes, all whole numbers
        widths = (ffn,) if isinstance(ffn, int) else tuple(ffn)
        per_layer = widths if len(set(widths)) > 1 else None
        return replace(self, ffn=max(widths), ffn_per_layer=per_layer, **sizes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Architecture:
        scaling, widths = fields.get("rope_scaling"), fields.get("ffn_per_layer")
        parts = {"rope_scaling": RopeScaling(**scaling) if scaling else None, "ffn_per_layer": tuple(widths) if widths else None}
        return Architecture(**{**fields, **parts})


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of divisor on both sides of value, as text for an error message."""
    below = value - value % divisor
    return f"{below}, {below + divisor}" if below else f"{divisor}"


def width_range(arch: Architecture) -> str:
    """The width of the layers' FFNs, as text: "28", or "16–40" where layers differ."""
    narrow, wide = min(arch.ffn_widths), max(arch.ffn_widths)
    return f"{wide}" if narrow == wide else f"{narrow}–{wide}"


def parameters_by_part(arch: Architecture) -> dict[str, int]:
    """Parameter counts of each part; a tied output weight counts once, under embedding. Routers have a part where there are experts."""
    kind = arch.family
    projection = arch.heads * arch.head_channels * arch.hidden
    attention = arch.qkv_rows * arch.hidden + projection
    attention += arch.qkv_rows if kind.qkv_bias else 0
    attention += 2 * arch.head_channels if kind.qk_norm else 0
    embedding = arch.vocab * arch.hidden
    matrices = 3 if kind.is_gated else 2
    norm = arch.hidden if kind.norm == "rmsnorm" else 2 * arch.hidden  # the other has a bias
    return {
        "embedding": embedding,
        "attention": arch.layers * attention,
        "ffn": sum(arch.ffn_widths) * max(arch.experts, 1) * matrices * arch.hidden,
        **({"routers": arch.layers * arch.experts * arch.hidden} if arch.experts else {}),
        "norms": (2 * arch.layers + 1) * norm,
        "output": 0 if arch.tied_embeddings else embedding,
    }


def parameter_count(arch: Architecture) -> int:
    """All parameters, tied weights once."""
    return sum(parameters_by_part(arch).values())


def nonembedding_parameter_count(arch: Architecture) -> int:
    """Parameters without the embedding and the output layer, which grow with the vocabulary (as P1, Table 1 has them)."""
    parts = parameters_by_part(arch)
    return sum(parts.values()) - parts["embedding"] - parts["output"]


def active_parameter_count(arch: Architecture) -> int:
    """Parameters that one token meets: of the experts only those that it is sent to."""
    return sum(_active_parts(arch).values())


def _active_parts(arch: Architecture) -> dict[str, int]:
    parts = parameters_by_part(arch)
    if arch.experts:
        parts["ffn"] = parts["ffn"] // arch.experts * arch.experts_per_token
    return parts


def forward_flops_per_token(arch: Architecture, sequence_length: int) -> int:
    """Multiply-adds counted as two: every matrix that a token meets once, plus causal attention at this sequence length."""
    matrices = sum(layer_costs(arch)) + arch.vocab * arch.hidden
    # a token attends to half the sequence on average; scores and weighted values are one product each
    attention = 2 * arch.layers * arch.heads * arch.head_channels * sequence_length // 2
    return 2 * (matrices + attention)


def kv_cache_bytes_per_token(arch: Architecture, bytes_per_value: int = 2) -> int:
    """Keys and values of one token over all layers; bf16 by default."""
    return 2 * arch.layers * arch.kv_groups * arch.head_channels * bytes_per_value


def layer_costs(arch: Architecture) -> tuple[int, ...]:
    """[L] matrix parameters of each layer that a token meets."""
    parts = _active_parts(arch)
    beside_ffn = (parts["attention"] + parts.get("routers", 0)) // arch.layers
    of_neuron = parts["ffn"] // sum(arch.ffn_widths)
    return tuple(beside_ffn + of_neuron * width for width in arch.ffn_widths)


def layer_cost(arch: Architecture) -> int:
    """Of a layer of mean width: the unit in which pipeline stages are balanced."""
    return sum(layer_costs(arch)) // arch.layers


def output_cost(arch: Architecture) -> int:
    """Matrix parameters of the output layer, in the unit of layer_cost."""
    return arch.vocab * arch.hidden
