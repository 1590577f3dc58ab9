"""Section `correct`: the teacher is trained on the distillation data before it teaches (teacher correction).

Source: P2 = arXiv 2408.11796.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, model_validator

from minitron_megatron.config.distill import MAY_CHANGE_IN_A_RUN, LearningRate, TrainingRun
from minitron_megatron.config.section import UNSHAPING, Section

FRACTION_OF_THE_SOURCES_PEAK = 1 / 5
"""P2, sections 2.1 and 4."""


class CorrectionRate(LearningRate):
    """Linear warm-up over 120 steps (P2 section 4), then cosine."""

    peak: float = Field(gt=0, description="give it, or correct.source_peak")
    warmup_steps: int = Field(120, ge=0)


class Correct(TrainingRun):
    """Cross-entropy on the distillation data: a teacher that has not seen it guides less well (P2 section 2.1).

    The peak of the learning rate is a fifth of the one that the source was trained with (P2 section 4), or given as learning_rate.peak.
    """

    source_peak: float | None = Field(None, gt=0, description="peak learning rate of the source's own training; the correction's is a fifth of it")
    learning_rate: CorrectionRate
    beside: Annotated[bool, UNSHAPING] = Field(
        False, description="another job (`minitron correct RECIPE`) corrects while the distillation runs, which takes up what it saves"
    )
    mask_boundaries: bool = Field(False, description="as distill.mask_boundaries")
    keep_snapshots: Annotated[int, UNSHAPING] = Field(
        2, ge=2, description="beside: newest published teachers kept, besides those that the distillation's checkpoints name"
    )

    @model_validator(mode="before")
    @classmethod
    def _peak_of_the_source(cls, values: Any) -> Any:
        if not isinstance(values, dict) or isinstance(values.get("learning_rate"), LearningRate):
            return values
        peak, rate = values.get("source_peak"), values.get("learning_rate") or {}
        if not isinstance(rate, dict) or (peak is not None and not _is_number(peak)):
            return values
        if peak is None and rate.get("peak") is None:
            raise ValueError("give correct.source_peak, the peak learning rate of the source's own training, or correct.learning_rate.peak")
        own = None if peak is None else peak * FRACTION_OF_THE_SOURCES_PEAK
        if own is not None and _is_number(rate.get("peak", own)) and not math.isclose(rate.get("peak", own), own):
            raise ValueError(
                f"correct.source_peak={peak} asks for learning_rate.peak={own:g}, which is given as {rate['peak']}; leave one of them out"
            )
        return values if own is None else {**values, "learning_rate": {**rate, "peak": own}}

    def lasting(self) -> dict[str, Any]:
        """What shapes the corrected weights of a step, whatever may change from one start of the run to the next."""
        return {name: value for name, value in self.shaping().items() if name not in MAY_CHANGE_IN_A_RUN}


class CorrectionBeside(Section):
    """The part of `correct` that shapes a distillation beside it: not which of its steps had been saved when."""

    run: dict[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
