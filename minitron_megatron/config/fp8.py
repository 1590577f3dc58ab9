"""Section `fp8`: 8-bit floating point in the stages that train, set apart for the frozen teacher and for the model that is trained.

Names are Transformer Engine's and megatron-core's: delayed scaling (arXiv 2209.05433, section 3), tensorwise (current) scaling, blockwise
(1×128 and 128×128 blocks, arXiv 2412.19437, section 3.3), mxfp8 (arXiv 2310.10537) and nvfp4 on Blackwell.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from minitron_megatron.config.section import UNSHAPING, Section

Scaling = Literal["delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"]
Format = Literal["hybrid", "e4m3"]

MULTIPLE: dict[Scaling, int] = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32, "nvfp4": 32}
"""Of both sides of every matrix on a tensor-parallel rank.

16: rows of FP8 begin at 16 bytes, and backward needs them in either direction. 128: a block; Transformer Engine takes parts of one too, but then
layouts cut blocks at different values and round differently. 32: a block of mxfp8, and 16 bytes of nvfp4.
"""
OF_DELAYED = ("amax_history", "amax_algorithm", "margin")
"""Fields that other scalings do not look at."""


@dataclass(frozen=True)
class ModelFp8:
    """How one model computes in FP8; without one it computes in the recipe's precision alone."""

    scaling: Scaling
    format: Format = "hybrid"
    weights: bool = False
    """Whether its weights are FP8 themselves: what a frozen model saves memory by; in training they have an fp32 main copy."""
    first_last_layers_bf16: bool = False
    amax_history: int = 1024
    amax_algorithm: Literal["max", "most_recent"] = "max"
    margin: int = 0
    emulated: bool = False

    def covers(self, layer: int, layers: int) -> bool:
        """Whether this one of a model's layers computes in FP8."""
        return not (self.first_last_layers_bf16 and layer in (0, layers - 1))

    def shaping(self) -> dict[str, Any]:
        """The values that shape what is computed under this scaling."""
        unread = () if self.scaling == "delayed" else OF_DELAYED
        return {name: value for name, value in asdict(self).items() if name not in unread}


class Fp8(Section):
    """Embedding, output layer, norms, attention scores and the losses stay in the recipe's precision."""

    teacher: Literal["none", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = Field(
        "none", description="scaling of the frozen teacher, whose weights are then kept in FP8 alone; delayed scaling would never learn its scales"
    )
    student: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = Field(
        "none", description="scaling of the model that a stage trains"
    )
    format: Format = Field("hybrid", description="of the student. hybrid: e4m3 forward, e5m2 for gradients; e4m3: for both")
    weights: bool = Field(
        False, description="the student's weights are FP8, beside the fp32 main copy; with a distributed optimizer they are gathered so"
    )
    first_last_layers_bf16: bool = Field(False, description="the student's first and last layer stay in bf16; not with delayed scaling")
    amax_history: int = Field(1024, ge=1, description="passes, one for each micro-batch, that delayed scaling looks back over")
    amax_algorithm: Literal["max", "most_recent"] = Field(
        "max", description="of delayed scaling: the largest of these passes sets the scale, or the newest"
    )
    margin: int = Field(0, ge=0, description="powers of two that delayed scaling keeps free above the largest value")
    emulated: bool = Field(False, description="rounded as FP8 would round, computed in the recipe's precision: to learn and to test without a GPU")

    @field_validator("teacher", mode="before")
    @classmethod
    def _no_delayed_teacher(cls, value: Any) -> Any:
        if value == "delayed":
            raise ValueError(
                "delayed scaling learns its scales from the steps of a training, and a frozen teacher has none; use tensorwise or blockwise"
            )
        return value

    @property
    def of_teacher(self) -> ModelFp8 | None:
        return None if self.teacher == "none" else ModelFp8(self.teacher, weights=True, emulated=self.emulated)

    @property
    def of_student(self) -> ModelFp8 | None:
        if self.student == "none":
            return None
        past = (self.amax_history, self.amax_algorithm, self.margin)
        return ModelFp8(self.student, self.format, self.weights, self.first_last_layers_bf16, *past, self.emulated)


class Numbers(Section):
    """How a model computes, where that is not in the recipe's precision alone: the part that shapes a result."""

    precision: Literal["fp32", "bf16"] | None = None
    fp8: dict[str, Any] | None = None


class Fp8Multiple(Section):
    """What sizes that are pruned to are multiples of, because the model is then trained in FP8; on each of prune.align.tensor ranks."""

    multiple: int
    scaling: Annotated[Scaling, UNSHAPING]
    """For messages."""
