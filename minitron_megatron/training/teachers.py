"""What the training loop asks of teachers and of losses on inner states: the stages hand it such, or none.

Legend: B samples of a micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from minitron_megatron.data.batches import Batch, MicroBatches
from minitron_megatron.training.losses.target import Target

Load = Callable[[tuple[int, ...]], Batch]
"""Sample ids → batch on the device, of whole sequences: what context ranks take of it depends on the model's layout."""


class TeacherStates(Protocol):
    """What teachers made of one global batch, found by the sample ids of a micro-batch."""

    def targets(self, batch: Batch) -> Sequence[Target]:
        """One for each teacher; handed out once."""


class Teachers(Protocol):
    """Frozen models that run ahead of the student."""

    @property
    def identity(self) -> str:
        """Of the artifact that teaches now, where it changes in the course of a run; else empty."""

    def states(self, groups: MicroBatches, load: Load, wanted: Sequence[Any] = ()) -> TeacherStates:
        """Of the micro-batches; inner states where they are wanted. Every process calls this."""

    def renew(self) -> None:
        """Takes up the newest teacher, where it changes in the course of a run; every process calls this."""


class NoTeachers:
    """The text alone: nothing runs ahead, and no states are held."""

    identity = ""

    def states(self, groups: MicroBatches, load: Load, wanted: Sequence[Any] = ()) -> NoTeachers:
        return self

    def targets(self, batch: Batch) -> Sequence[Target]:
        return ()

    def renew(self) -> None:
        """There is none."""


class Balance(Protocol):
    """α, the weight of the losses on inner states."""

    alpha: Tensor
    is_set: bool

    def update(self, logit_sum: Tensor, hidden_sum: Tensor) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class HiddenTraining(Protocol):
    """Losses on inner states of the student."""

    @property
    def balance(self) -> Balance: ...

    @property
    def wanted(self) -> Sequence[Any]:
        """The teacher's inner states that they compare with."""

    def training(self) -> AbstractContextManager[None]: ...

    def measuring(self) -> AbstractContextManager[None]: ...

    def expect(self, teacher: Any, chunk: int, batch: Batch) -> None: ...

    def take_sums(self) -> Tensor: ...

    def sum_shared_gradients(self, wrapped: Sequence[nn.Module]) -> None: ...
