"""Which layers go: candidates, the order in which they are tried, and how clear each choice is.

block: one contiguous block (P2 section 3: better on downstream tasks than as many layers ranked one by one). ranked: every layer left out
alone, the least missed go together (P1 section 2.2). greedy: the least missed goes, and the rest is measured anew without it
(arXiv 2511.16664).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minitron_megatron.config.depth import Removal
from minitron_megatron.depth.measured import Measured, error_of_difference
from minitron_megatron.errors import PlanError

Layers = tuple[int, ...]
Measure = Callable[[Layers], Measured]
"""All layers that are left out together, ascending → what that does."""
NOISE = 2.0
"""Standard errors of the difference below which a choice is called noise."""


@dataclass(frozen=True)
class Choice:
    """What is to be chosen from what."""

    removal: Removal
    drop: int
    candidates: range
    """Layers that may go."""
    higher_is_better: bool = False
    """Of the measured value: an accuracy, and not a loss or an error."""

    @property
    def rounds(self) -> int:
        return self.drop if self.removal == "greedy" else 1

    @property
    def taken(self) -> int:
        """Candidates that go in a round."""
        return self.drop if self.removal == "ranked" else 1

    @property
    def measurements(self) -> int:
        """How many times something is measured."""
        if self.removal == "block":
            return len(self.candidates) - self.drop + 1
        return sum(len(self.candidates) - gone for gone in range(self.rounds))

    def of_round(self, removed: Layers) -> list[Layers]:
        if self.removal == "block":
            firsts = self.candidates[: len(self.candidates) - self.drop + 1]
            return [tuple(range(first, first + self.drop)) for first in firsts]
        return [(layer,) for layer in self.candidates if layer not in removed]


@dataclass(frozen=True)
class Round:
    """One choice: what had gone before, what each candidate does beside it, which go."""

    removed: Layers
    measured: dict[Layers, Measured]
    order: list[Layers]
    """Candidates from the least missed to the most; of equal ones the later layers first, as the lower index is kept elsewhere."""
    taken: int

    @property
    def chosen(self) -> list[Layers]:
        return self.order[: self.taken]

    @property
    def margin(self) -> tuple[float, float | None] | None:
        """Distance between the last candidate that goes and the first that stays, with its standard error; None where all go."""
        if self.taken >= len(self.order):
            return None
        goes, stays = (self.measured[self.order[place]] for place in (self.taken - 1, self.taken))
        return abs(stays.value - goes.value), error_of_difference(stays, goes)

    @property
    def is_noise(self) -> bool | None:
        """Whether the choice could as well have been the next one; None where that is not known."""
        if self.margin is None or self.margin[1] is None:
            return None
        return self.margin[0] < NOISE * self.margin[1]

    def to_dict(self) -> dict[str, Any]:
        margin, error = self.margin or (None, None)
        return {
            "removed": list(self.removed),
            "candidates": [{"layers": list(layers), "value": found.value, "stderr": found.stderr} for layers, found in self.measured.items()],
            "chosen": [list(layers) for layers in self.chosen],
            "next": list(self.order[self.taken]) if self.taken < len(self.order) else None,
            "margin": margin,
            "margin_stderr": error,
            "is_noise": self.is_noise,
        }


def choose(choice: Choice, measure: Measure) -> list[Round]:
    """Measures every candidate, round after round; raises PlanError where not even the best one's figure is a number."""
    rounds: list[Round] = []
    removed: Layers = ()
    for _ in range(choice.rounds):
        measured = {candidate: measure(tuple(sorted((*removed, *candidate)))) for candidate in choice.of_round(removed)}
        sign = -1 if choice.higher_is_better else 1
        order = sorted(measured, key=lambda layers: (_last_if_no_number(sign * measured[layers].value), -layers[0]))
        if not math.isfinite(measured[order[choice.taken - 1]].value):
            raise PlanError(f"depth: without layers {[*removed, *order[0]]} nothing finite is measured; the model or the text is broken")
        rounds.append(Round(removed, measured, order, choice.taken))
        removed = (*removed, *(layer for layers in rounds[-1].chosen for layer in layers))
    return rounds


def _last_if_no_number(harm: float) -> float:
    return math.inf if math.isnan(harm) else harm


def unclear_rounds(rounds: list[Round]) -> list[Round]:
    """Those whose runner-up stays although it could as well have gone; one that goes in a later round makes no other model."""
    gone = set(order_of_removal(rounds))
    return [item for item in rounds if item.is_noise and not gone.issuperset(item.order[item.taken])]


def is_noise(rounds: list[Round]) -> bool | None:
    """Whether other layers could as well have gone; None where no error is known of a choice that left some, and none is noise for sure."""
    if unclear_rounds(rounds):
        return True
    return None if any(item.margin is not None and item.is_noise is None for item in rounds) else False


def order_of_removal(rounds: list[Round]) -> list[int]:
    return [layer for item in rounds for layers in item.chosen for layer in layers]
