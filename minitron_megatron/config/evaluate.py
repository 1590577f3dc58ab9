"""Section `evaluate`: what is compared at the end."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from minitron_megatron.config.section import Section

EvaluatedModel = Literal["teacher", "pruned", "distilled", "finetuned"]


class Evaluate(Section):
    """Held-out perplexity, agreement with the teacher, tasks, a continuation."""

    models: list[EvaluatedModel] | Literal["all"] = Field(
        "all", description="the teacher and what is compared with it; all: whatever the chain makes"
    )
    tokens: Annotated[int, Field(ge=1)] | Literal["all"] = Field("all", description="tokens of each domain, in whole windows")
    sequence_length: int = Field(4096, ge=2)
    tasks: list[str] = Field([], description="lm-eval task files (.yaml) with local data")
    task_items: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    prompt: str = "The"
    generate_tokens: int = Field(32, ge=0)

    @property
    def names(self) -> tuple[str, ...]:
        """The models, in the chain's order."""
        known = get_args(EvaluatedModel)
        return known if self.models == "all" else tuple(name for name in known if name in self.models)

    @field_validator("models", mode="before")
    @classmethod
    def _teacher_and_others(cls, value: Any) -> Any:
        known = get_args(EvaluatedModel)
        listed = isinstance(value, list | tuple) and "teacher" in value and all(name in known for name in value)
        if value != "all" and not (listed and any(name != "teacher" for name in value)):
            raise ValueError(f"input should be all, or a list of teacher and others of {', '.join(known)}, such as [teacher, pruned]")
        return value if value == "all" else [name for name in known if name in value]

    @field_validator("tokens", "task_items", mode="before")
    @classmethod
    def _count_or_all(cls, value: Any) -> Any:
        if value != "all" and not (isinstance(value, int) and value >= 1):
            raise ValueError("input should be a whole number of 1 or more, or all")
        return value
