"""A finished (or half finished) run as plain data: what the page is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.arch.architecture import Architecture


@dataclass(frozen=True)
class RunData:
    """A run as read from its artifacts; None or empty where a stage has not been run."""

    recipe: dict[str, Any]
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    """plan.json of the stage prune."""
    pruned_by: dict[str, Any] | str | None = None
    """What the stage prune ranked by: of each axis its criterion and aggregation, or the name of a baseline."""
    importance: dict[str, Any] | None = None
    """summary.json of the stage importance."""
    depth: dict[str, Any] | None = None
    """depth.json of the stage depth, which not every run has."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl of the stage distill."""
    evaluation: dict[str, Any] | None = None
    """result.json of the stage evaluate."""
    ranking: dict[str, Any] | None = None
    """ranking.json of the stage search."""

    @property
    def shapes(self) -> tuple[Architecture, Architecture] | None:
        """Source and target."""
        if self.plan is None:
            return None
        return Architecture.from_dict(self.plan["source"]), Architecture.from_dict(self.plan["target"])

    @property
    def dropped_layers(self) -> list[int]:
        """Global numbers, in the source, of the layers that pruning dropped."""
        if self.plan is None:
            return []
        return sorted(set(range(self.plan["source"]["layers"])) - set(self.plan["kept_layers"]))

    def kept_of(self, kind: str) -> list[int | None]:
        """Units of a kind ("ffn", "heads", "experts") kept in each source layer, None where the layer is dropped; ffn: of each expert."""
        if self.plan is None:
            return []
        kept, layers = self.plan[kind], set(self.plan["kept_layers"])
        if kind == "ffn" and not kept:  # every expert keeps the same number
            kept = {layer: next(iter(experts.values())) for layer, experts in self.plan["expert_ffn"].items()}
        return [len(kept[str(layer)]) if layer in layers else None for layer in range(self.plan["source"]["layers"])]
