"""The student's output layer, whose forward is the loss.

It is called as a module, because DDP's hooks that gather parameters hang on module calls; nothing else reads its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from minitron_megatron.training.kd_loss import GradientBuffer, fused_distillation_loss
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import Target, TokenLabels


class DistillationOutputLayer(ColumnParallelLinear):
    """A ColumnParallelLinear that returns sums of losses when it is given labels, logits when it is not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_buffer = GradientBuffer()

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: TokenLabels | None = None,
        targets: Sequence[Target] = (),
        settings: LossSettings | None = None,
        rows: int = 0,
    ) -> tuple[Any, ...]:
        """input_: [S, B, D], under sequence parallelism this rank's part of S. See fused_distillation_loss for the sums."""
        if labels is None or settings is None:
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        weight = self.weight if weight is None else weight
        hidden_ND, buffer = hidden.flatten(0, 1), self.gradient_buffer
        return fused_distillation_loss(hidden_ND, weight, labels, targets, settings, rows=rows, group=self.tp_group, buffer=buffer)
