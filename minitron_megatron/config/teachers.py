"""Section `teachers`: several teachers with weights, or another one than the source."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from minitron_megatron.config.section import Section

SOURCE = "source"
"""Names the model that is compressed, corrected where the recipe says so: the teacher without this section."""


class TeacherModel(Section):
    path: str = Field(description="folder of a Hugging Face model or a Megatron checkpoint, or source")
    hf_config: str | None = Field(None, description="config.json that goes with a Megatron checkpoint")
    tokenizer: str | None = Field(None, description="folder with the tokenizer's files, where they do not lie beside config.json")
    weight: float = Field(1.0, gt=0, description="of its losses in the sum over teachers")

    @property
    def is_source(self) -> bool:
        return self.path == SOURCE


class Teachers(Section):
    """They replace the source as teacher. All have the student's vocabulary; losses on hidden states compare with the first.

    A teacher assistant (arXiv 1902.03393) is a recipe of its own: large → middle, whose exported model the next recipe names here.
    """

    models: list[TeacherModel] = Field(min_length=1)

    def shaping(self) -> dict[str, Any]:
        """Of what is imported; weights shape the distillation alone."""
        return {"models": [model.model_dump(mode="json", exclude={"weight"}) for model in self.models]}


class TeacherWeights(Section):
    """The part of `teachers` that shapes a distillation."""

    weights: list[float]
