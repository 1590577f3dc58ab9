"""The frozen teacher's side of a step: its forward-only schedule for the whole global batch, ahead of the student's.

It is never pulled from inside the student's schedule: ranks of one teacher group stand at different student micro-batches
there, and would wait for each other for ever.
"""

from __future__ import annotations

from torch import Tensor

from minitron_megatron.data.batches import Batch
from minitron_megatron.distill.kd_loss import TeacherTarget
from minitron_megatron.model.gpt import HiddenStateGPT
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.sequence import whole_sequence


class TeacherStates:
    """Final hidden states of the teacher, found by the global sample ids of a micro-batch; on the last stage."""

    def __init__(self, teacher: HiddenStateGPT, batches: list[Batch]) -> None:
        self._teacher = teacher
        hidden = forward_only(teacher, batches)
        self._hidden = {_key(batch): states for batch, states in zip(batches, hidden, strict=False)}

    def target(self, batch: Batch) -> TeacherTarget:
        """What the student of this micro-batch is held against; the states are handed out once and forgotten."""
        hidden_SBE = whole_sequence(self._hidden.pop(_key(batch)), self._teacher)
        return TeacherTarget(
            hidden_NE=hidden_SBE.flatten(0, 1),
            weight_vE=_required(self._teacher.output_weight()),
            labels_N=batch.labels_BS.t().flatten(),
            token_weights_N=batch.loss_mask_BS.t().flatten(),
        )


def _key(batch: Batch) -> tuple[int, ...]:
    return tuple(batch.sample_ids_B.tolist())


def _required(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise RuntimeError("the teacher's output weight is only on the last stage")
    return weight
