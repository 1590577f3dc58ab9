"""The recipe: one frozen, typed section per stage; units are in the names, defaults follow the papers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from minitron_megatron.config.chat import Chat
from minitron_megatron.config.correct import Correct, CorrectionBeside
from minitron_megatron.config.depth import Depth
from minitron_megatron.config.distill import Distill, Training, TrainingRun
from minitron_megatron.config.evaluate import Evaluate
from minitron_megatron.config.export import Export
from minitron_megatron.config.finetune import Finetune
from minitron_megatron.config.fp8 import Fp8
from minitron_megatron.config.importance import Importance
from minitron_megatron.config.labels import Labels
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune
from minitron_megatron.config.search import Search
from minitron_megatron.config.section import Section
from minitron_megatron.config.source import Data, Model
from minitron_megatron.config.teacher_logits import DistilledText, TeacherLogits
from minitron_megatron.config.teachers import Teachers, TeacherWeights


class Recipe(Section):
    """One compression from a source model to an exported student."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder below `runs`")
    runs: str = "runs"
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the machine multiplies in it, else fp32")
    model: Model
    data: Data
    chat: Chat | None = None
    labels: Labels | None = None
    parallel: Parallel = Parallel()
    importance: Importance = Importance()
    depth: Depth | None = None
    search: Search | None = Field(None, description="chooses the architecture in place of prune.target")
    prune: Prune
    teachers: Teachers | None = None
    correct: Correct | None = None
    teacher_logits: TeacherLogits | None = None
    distill: Distill
    finetune: Finetune | None = None
    training: Training = Training()
    fp8: Fp8 | None = Field(None, description="without it everything is in the recipe's precision")
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @property
    def teacher_weights(self) -> TeacherWeights | None:
        return TeacherWeights(weights=[model.weight for model in self.teachers.models]) if self.teachers else None

    @property
    def correct_beside(self) -> CorrectionBeside | None:
        """Of a correction that runs while the distillation does."""
        return CorrectionBeside(run=self.correct.lasting()) if self.correct and self.correct.beside else None

    @property
    def distilled_text(self) -> DistilledText:
        """What stored outputs of a teacher are of."""
        return DistilledText(text=self.distill.text, sequence_length=self.distill.sequence_length, seed=self.distill.seed)

    def training_runs(self) -> dict[str, TrainingRun]:
        """The sections of stages that train."""
        runs = {"correct": self.correct, "distill": self.distill, "finetune": self.finetune}
        return {section: run for section, run in runs.items() if run is not None}

    @model_validator(mode="before")
    @classmethod
    def _search_gives_the_sizes(cls, values: Any) -> Any:
        """Beside a search there may be nothing to say about pruning."""
        return {**values, "prune": {}} if isinstance(values, dict) and values.get("search") and "prune" not in values else values
