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
from minitron_megatron.config.fp8 import MULTIPLE, Fp8, Fp8Multiple, Numbers
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
    teacher_precision: Literal["same", "fp32", "bf16"] = Field("same", description="of the frozen teacher; same: as `precision`")
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

    @property
    def student_fp8(self) -> Numbers | None:
        """Of every model that a stage trains."""
        student = self.fp8.of_student if self.fp8 else None
        return Numbers(fp8=student.shaping()) if student else None

    @property
    def teacher_numbers(self) -> Numbers | None:
        """Of the frozen teacher."""
        own, fp8 = self.teacher_precision, self.fp8.of_teacher if self.fp8 else None
        if own == "same" and fp8 is None:
            return None
        return Numbers(precision=None if own == "same" else own, fp8=fp8.shaping() if fp8 else None)

    @property
    def live_teacher_numbers(self) -> Numbers | None:
        """Of a teacher that the distillation itself runs."""
        return self.teacher_numbers if self.distill.teacher_outputs == "live" else None

    @property
    def fp8_multiple(self) -> Fp8Multiple | None:
        """What pruning has to leave for the training that follows; an emulation has no kernels that would ask."""
        student = self.fp8.of_student if self.fp8 else None
        return Fp8Multiple(multiple=MULTIPLE[student.scaling], scaling=student.scaling) if student and not student.emulated else None

    @property
    def precision_of_teacher(self) -> str:
        """fp32 or bf16 once `precision` is settled for a machine."""
        return self.precision if self.teacher_precision == "same" else self.teacher_precision

    def training_runs(self) -> dict[str, TrainingRun]:
        """The sections of stages that train."""
        runs = {"correct": self.correct, "distill": self.distill, "finetune": self.finetune}
        return {section: run for section, run in runs.items() if run is not None}

    @model_validator(mode="before")
    @classmethod
    def _search_gives_the_sizes(cls, values: Any) -> Any:
        """Beside a search there may be nothing to say about pruning."""
        return {**values, "prune": {}} if isinstance(values, dict) and values.get("search") and "prune" not in values else values
