"""Section `parallel`: the sizes of the process groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from minitron_megatron.config.section import Section
from minitron_megatron.errors import LayoutError

Rule = str | Sequence[int]
"""How layers are dealt to pipeline stages: cost, even, or the layers of each stage."""


def _rule_or_list(value: Any) -> Any:
    listed = isinstance(value, list | tuple) and len(value) > 0 and all(type(item) is int and item >= 1 for item in value)
    if value not in ("cost", "even") and not listed:
        raise ValueError("input should be cost, even or a list of whole numbers of 1 or more")
    return value


LayersPerStage = Annotated[Literal["cost", "even"] | list[int], BeforeValidator(_rule_or_list)]


class TeacherParallel(Section):
    """The teacher's own layout in a distillation; its data-parallel size is what the processes leave."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    sequence: bool = False
    layers_per_stage: LayersPerStage = Field("cost", description="cost, even, or a list")


TeacherLayout = Annotated[
    Annotated[TeacherParallel, Tag("[own]")] | Annotated[Literal["auto", "student"], Tag("[name]")],
    Discriminator(lambda value: "[name]" if isinstance(value, str) else "[own]"),
]


class Parallel(Section):
    """Sizes of the process groups; their product is the number of processes. The source, the pruned model and the student use it."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual: int = Field(1, ge=1, description="virtual pipeline stages of each process (interleaved 1F1B)")
    data: int = Field(1, ge=1)
    expert: int = Field(1, ge=1, description="data-parallel ranks that share the experts of a layer out among themselves; divides data")
    context: int = Field(
        1, ge=1, description="ranks that share each sequence out in training, the teacher's too; other stages take them as data-parallel ranks"
    )
    sequence: bool = Field(False, description="sequence parallel: activations between tensor-parallel regions are sharded along the sequence")
    layers_per_stage: LayersPerStage = Field(
        "cost", description="cost: stages of equal work, embedding and output layer counted; even: equal numbers; a list: layers of each stage"
    )
    teacher: TeacherLayout = Field(
        "auto", description="layout of the teacher; auto: without a pipeline where its weights fit beside the student's; student: the same sizes"
    )

    timeout_seconds: int = Field(1800, ge=1, description="longest wait of a process for the others; then the run ends instead of hanging")

    def without_virtual_stages(self) -> Parallel:
        """For passes whose micro-batches differ in shape, which an interleaved pipeline does not take; a list was for the virtual stages."""
        rule = self.layers_per_stage if self.virtual == 1 else "cost"
        return self.model_copy(update={"virtual": 1, "layers_per_stage": rule})

    def without_context(self) -> Parallel:
        """For stages that do not train: the ranks of a sequence are data-parallel ranks there, which change no bit of a sample's arithmetic."""
        return self.model_copy(update={"context": 1, "data": self.context * self.data})

    @property
    def processes(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    def replicas(self, processes: int) -> int:
        """The data-parallel size that takes all of so many processes; raises LayoutError where they are no multiple of the model's."""
        model = self.processes // self.data
        if processes % model:
            raise LayoutError(f"{processes} processes are no multiple of the {model} that tensor × context × pipeline need; use another --nodes")
        return processes // model
