"""Section `prune`: what is kept.

Sources: P1 = arXiv 2407.14679, P2 = arXiv 2408.11796.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from minitron_megatron.config.criteria import Aggregations, Criteria, Ranking
from minitron_megatron.config.importance import ImportanceAggregation
from minitron_megatron.config.section import Section


def _width_or_list(value: Any) -> Any:
    listed = isinstance(value, list | tuple) and len(value) > 0
    if value is not None and not all(type(item) is int and item >= 1 for item in (value if listed else (value,))):
        raise ValueError("input should be a whole number of 1 or more, or a list of them")
    return value


def _layer_numbers(value: Any) -> Any:
    """16-30, [1, 16-30] or "1,16-30" → [1, 16, …, 30]; both ends of a range are in it."""
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    ends = [str(item).strip().split("-") for item in items]
    if not ends or not all(len(pair) <= 2 and all(end.isdecimal() for end in pair) and int(pair[0]) <= int(pair[-1]) for pair in ends):
        raise ValueError("input should be a list of layer numbers, counted from 0, and ranges such as 16-30")
    numbers = [number for pair in ends for number in range(int(pair[0]), int(pair[-1]) + 1)]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a layer is named twice")
    return sorted(numbers)


class Target(Section):
    """Sizes of the pruned model; a size that is not named stays as it is."""

    layers: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1, description="embedding channels")
    ffn: Annotated[int | list[int] | None, BeforeValidator(_width_or_list)] = Field(
        None, description="FFN neurons of every layer, or a list with a number for each kept layer"
    )
    heads: int | None = Field(
        None, ge=1, description="query heads in all, the same number in each kept key/value group; not named: all heads of the kept groups"
    )
    kv_groups: int | None = Field(None, ge=1, description="key/value groups; all query heads of a group go with it")
    experts: int | None = Field(None, ge=1, description="experts of every layer; ffn is then the width of each")

    def sizes(self) -> dict[str, int | list[int]]:
        return {name: size for name, size in self.model_dump().items() if size is not None}


class Align(Section):
    """Multiples that sizes named in prune.target are rounded to: the nearest one, the larger of two as near, never above the source's size."""

    hidden: int = Field(1, ge=1)
    ffn: int = Field(1, ge=1, description="64 or 128: what matrix units of GPUs are fast with")
    heads: int = Field(1, ge=1)
    kv_groups: int = Field(1, ge=1)
    tensor: int = Field(
        1,
        ge=1,
        description="tensor-parallel ranks among which heads, key/value groups and ffn have to be divisible; ${parallel.tensor}: this recipe's",
    )


class Prune(Section):
    """What is kept: the units with the highest scores (P1 section 2.3)."""

    target: Target = Field(Target(), description="the sizes that are kept; left out where the recipe has a section `search`")
    align: Align = Align()
    ffn_by: Literal["layer", "global"] = Field(
        "layer", description="global: neurons of all layers are ranked together, and target.ffn is what layers keep on average"
    )
    drop_layers: Annotated[list[int] | None, BeforeValidator(_layer_numbers)] = Field(
        None, description="layers to drop in place of the lowest-scored ones, counted from 0: [1, 16-30]"
    )
    head_residual: bool = Field(False, description="add what pruned heads differ by to the queries of kept ones (P1 section 2.3)")
    scores: Literal["activation", "magnitude", "random"] = Field("activation", description="magnitude and random are baselines")
    scores_file: str | None = Field(None, description="scores of a merge or of another run, in place of this run's importance stage")
    aggregation: ImportanceAggregation = ImportanceAggregation()
    aggregations: Aggregations = Aggregations()
    criteria: Criteria = Criteria()
    seed: int = Field(0, ge=0, description="of the random baseline")

    @property
    def ranking(self) -> Ranking:
        return Ranking(self.aggregation, self.aggregations, self.criteria)

    @property
    def reads_importance(self) -> bool:
        """Whether the scores are those of this run's importance stage."""
        return self.scores == "activation" and self.scores_file is None
