"""What the output layer's loss is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

TOP_K = "forward_kl_top_k"
SAMPLED = "forward_kl_sampled"
OF_STORED = {"top_k": TOP_K, "sample": SAMPLED}
"""What forward KL is called against each kind of stored outputs."""
REDUCE_TWICE = {TOP_K, SAMPLED, "jensen_shannon"}
"""Losses with a second all-gather a chunk."""


@dataclass(frozen=True)
class LossSettings:
    """Weights of the losses by name; those that depend on temperature are multiplied by its square (arXiv 1503.02531, section 2)."""

    weights: Mapping[str, float | Tensor] = field(default_factory=lambda: {"forward_kl": 1.0})
    """A tensor [] on the device, or a number."""
    temperature: float = 1.0
    chunk_tokens: int | None = None
    """Tokens whose logits exist at one time; None: as many as memory_bytes has room for."""
    memory_bytes: int = 512 << 20
    """For the logits of the chunks under way and what is computed from them; the weight's gradient comes on top."""
    top_k: int | None = None
    """Forward KL is trained on over the teacher's K likeliest tokens and one class for all others; over the whole vocabulary it is logged."""
    stored: str = ""
    """Kind of the stored outputs that stand for the teacher: of OF_STORED. The KL over the whole vocabulary is not known then."""
    has_teacher: bool = True
    """Without one the labels alone count."""

    @property
    def objective(self) -> dict[str, float | Tensor]:
        """The losses that are trained on and their weights."""
        name_of = {"forward_kl": OF_STORED.get(self.stored, TOP_K if self.top_k else "forward_kl")}
        return {name_of.get(name, name): weight for name, weight in self.weights.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that are summed, in order: KL and cross-entropy for the log whatever is trained on, then the others that are."""
        always = ("forward_kl", "cross_entropy") if self.has_teacher and not self.stored else ("cross_entropy",)
        return tuple(dict.fromkeys((*always, *self.objective)))

    @property
    def takes_chunks_whole(self) -> bool:
        """Whether a loss reduces over the ranks once more, in the middle, so that a chunk cannot be gone through block by block."""
        return not REDUCE_TWICE.isdisjoint(self.objective)

    def total(self, sums: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> Any:
        """The weighted sum of losses by name: numbers or tensors []; 0 where none is left."""
        parts = [weight * sums[name] for name, weight in self.objective.items() if name not in without]
        return sum(parts[1:], start=parts[0]) if parts else 0.0
