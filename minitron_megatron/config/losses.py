"""Names and weights of the losses on the output layer's logits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_serializer

from minitron_megatron.config.section import Section

LossName = Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine", "cross_entropy"]


class WeightSchedule(Section):
    """A weight that moves with the steps: `{from: 1, to: 0, kind: cosine, steps: 200}`."""

    start: float = Field(alias="from", ge=0, description="weight at the first step")
    end: float = Field(alias="to", ge=0, description="weight after the schedule's steps and from there on")
    kind: Literal["cosine", "linear"] = "cosine"
    steps: int | None = Field(None, ge=1, description="without it the whole run: the last step has the weight `to`")

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"from": self.start, "to": self.end, "kind": self.kind, **({"steps": self.steps} if self.steps else {})}


def _tag(value: Any) -> str:
    if isinstance(value, dict | WeightSchedule):
        return "[schedule]"
    return "[word]" if isinstance(value, str) else "[number]"


def _truth_is_no_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should not be true or false")
    return value


LossWeight = Annotated[
    Annotated[float, BeforeValidator(_truth_is_no_number), Tag("[number]")]
    | Annotated[Literal["dynamic"], Tag("[word]")]
    | Annotated[WeightSchedule, Tag("[schedule]")],
    Discriminator(_tag),
]
