"""What the output layer's loss is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class LossSettings:
    """Weights of the losses by name; a weight may be a tensor [] on the device."""

    weights: Mapping[str, float | Tensor] = field(default_factory=lambda: {"forward_kl": 1.0})
    temperature: float = 1.0
    chunk_tokens: int = 256
    has_teacher: bool = True
    """Without one the labels alone count."""

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that are summed, in order: KL and cross-entropy for the log whatever is trained on, then the others that have a weight."""
        always = ("forward_kl", "cross_entropy") if self.has_teacher else ("cross_entropy",)
        return tuple(dict.fromkeys((*always, *self.weights)))

    def total(self, sums: Mapping[str, Number]) -> Number:
        """The weighted sum of losses by name."""
        first, *others = (weight * sums[name] for name, weight in self.weights.items())
        return sum(others, start=first)  # type: ignore[arg-type,return-value]
