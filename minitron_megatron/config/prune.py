"""Section `prune`: what is kept.

Sources: P1 = arXiv 2407.14679, P2 = arXiv 2408.11796.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from minitron_megatron.config.importance import ImportanceAggregation
from minitron_megatron.config.section import Section


class Target(Section):
    """Sizes of the pruned model; a size that is not named stays as it is."""

    layers: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1, description="embedding channels")
    ffn: int | None = Field(None, ge=1, description="FFN neurons of every layer")
    heads: int | None = Field(None, ge=1, description="query heads, the same number in each key/value group")
    experts: int | None = Field(None, ge=1, description="experts of every layer; ffn is then the width of each")

    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in self.model_dump().items() if size is not None}


class Prune(Section):
    """What is kept: the units with the highest scores (P1 section 2.3)."""

    target: Target = Field(Target(), description="the sizes that are kept; left out where the recipe has a section `search`")
    scores: Literal["activation", "magnitude", "random"] = Field("activation", description="magnitude and random are baselines")
    scores_file: str | None = Field(None, description="scores of a merge or of another run, in place of this run's importance stage")
    aggregation: ImportanceAggregation = ImportanceAggregation()
    seed: int = Field(0, ge=0, description="of the random baseline")

    @property
    def reads_importance(self) -> bool:
        """Whether the scores are those of this run's importance stage."""
        return self.scores == "activation" and self.scores_file is None
