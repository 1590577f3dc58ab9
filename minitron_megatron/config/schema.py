"""The recipe: one frozen, typed section per stage; units are in the names, defaults follow the papers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from minitron_megatron.config.distill import Distill, Training
from minitron_megatron.config.evaluate import Evaluate
from minitron_megatron.config.importance import Importance
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune
from minitron_megatron.config.search import Search
from minitron_megatron.config.section import Section
from minitron_megatron.config.source import Data, Model


class Recipe(Section):
    """One compression from a source model to an exported student."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder below `runs`")
    runs: str = "runs"
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the machine multiplies in it, else fp32")
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    importance: Importance = Importance()
    search: Search | None = Field(None, description="chooses the architecture in place of prune.target")
    prune: Prune
    distill: Distill
    training: Training = Training()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="before")
    @classmethod
    def _search_gives_the_sizes(cls, values: Any) -> Any:
        """Beside a search there may be nothing to say about pruning."""
        return {**values, "prune": {}} if isinstance(values, dict) and values.get("search") and "prune" not in values else values
