"""What `prune` ranks the units of an axis by: all of it is in one scores file, chosen after the pass.

Source: P1 = arXiv 2407.14679, section 2.2 and Table 11.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from minitron_megatron.config.importance import Aggregation, ImportanceAggregation
from minitron_megatron.config.section import Section

AggregatedAxis = Literal["ffn", "heads", "channels", "experts"]


class Criteria(Section):
    """What is scored of each axis; the defaults are those of the widely used code (ModelOpt), the others those of P1's text."""

    ffn: Literal["input_of_second", "before_activation"] = Field(
        "input_of_second", description="a neuron by the input of the second matrix, or by X·W1 before the activation (of a gated FFN: the gate's)"
    )
    heads: Literal["per_channel", "per_token_norm", "behind_projection"] = Field(
        "per_channel",
        description="a head by the L2 norm of its channels' aggregates, or by the aggregate of its output's L2 norm at each token, "
        "before the projection or behind the head's part of it (ours)",
    )
    channels: Literal["layer_norms", "all_norms"] = Field(
        "layer_norms", description="summed over both norms of every layer, or over the final one too"
    )


class AxisAggregation(Section):
    """Of one axis; what is not named is as in prune.aggregation."""

    batch: Aggregation | None = None
    sequence: Aggregation | None = None


class Aggregations(Section):
    """By axis, in place of prune.aggregation; key/value groups go with heads, the neurons within experts with ffn."""

    ffn: AxisAggregation = AxisAggregation()
    heads: AxisAggregation = AxisAggregation()
    channels: AxisAggregation = AxisAggregation()
    experts: AxisAggregation = AxisAggregation()


@dataclass(frozen=True)
class Ranking:
    """Everything that says how the statistics of a scores file become scores."""

    aggregation: ImportanceAggregation = field(default_factory=ImportanceAggregation)
    aggregations: Aggregations = field(default_factory=Aggregations)
    criteria: Criteria = field(default_factory=Criteria)

    def of(self, axis: AggregatedAxis) -> ImportanceAggregation:
        own: AxisAggregation = getattr(self.aggregations, axis)
        return ImportanceAggregation(batch=own.batch or self.aggregation.batch, sequence=own.sequence or self.aggregation.sequence)

    def to_dict(self, *, sparse: bool) -> dict[str, dict[str, Any]]:
        """Axis → criterion, batch and sequence aggregation, for people and files; sparse: the layers have experts in place of an FFN."""
        neurons: dict[str, tuple[str, AggregatedAxis]] = {"ffn": (self.criteria.ffn, "ffn")}
        experts: dict[str, tuple[str, AggregatedAxis]] = {
            "experts": ("output_norm_behind_router", "experts"),
            "expert_ffn": ("input_of_second_behind_router", "ffn"),
        }
        shared: dict[str, tuple[str, AggregatedAxis]] = {
            "heads": (self.criteria.heads, "heads"),
            "kv_groups": ("l2_over_heads", "heads"),
            "channels": (self.criteria.channels, "channels"),
        }
        axes = (experts if sparse else neurons) | shared
        return {name: {"criterion": criterion, **self.of(axis).model_dump()} for name, (criterion, axis) in axes.items()}


DEFAULT_RANKING = Ranking()
