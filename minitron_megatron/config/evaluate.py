"""Section `evaluate`: what is compared at the end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from minitron_megatron.config.section import Section


class Evaluate(Section):
    """Held-out perplexity, agreement with the teacher, tasks, a continuation."""

    tokens: Annotated[int, Field(ge=1)] | Literal["all"] = Field("all", description="tokens of each domain, in whole windows")
    sequence_length: int = Field(4096, ge=2)
    tasks: list[str] = Field([], description="lm-eval task files (.yaml) with local data")
    task_items: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    prompt: str = "The"
    generate_tokens: int = Field(32, ge=0)

    @field_validator("tokens", "task_items", mode="before")
    @classmethod
    def _count_or_all(cls, value: Any) -> Any:
        if value != "all" and not (isinstance(value, int) and value >= 1):
            raise ValueError("input should be a whole number of 1 or more, or all")
        return value
