"""Delayed scaling (arXiv 2209.05433, section 3.4): a pass is rounded with scales that earlier passes have left.

Transformer Engine moves the forward scales behind the forward pass of every micro-batch and the backward ones behind its backward pass, with the
largest values of all ranks of the amax group; so does this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor, nn

from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.model.fp8.emulation.rounding import amax_of, largest
from minitron_megatron.model.fp8.emulation.scaling import Rounded, Types, by_scale

INPUT, WEIGHT = 0, 1
"""Columns of the forward scales."""


class AmaxHistory(nn.Module):
    """Largest values of some tensors, [passes, tensors], and their scales, [tensors]; row 0 is the pass under way."""

    amax: Tensor
    scale: Tensor

    def __init__(self, fp8: ModelFp8, dtype: torch.dtype, tensors: int) -> None:
        super().__init__()
        self._most_recent, self._numerator = fp8.amax_algorithm == "most_recent", largest(dtype) / 2**fp8.margin
        # not persistent: a published checkpoint has weights alone
        self.register_buffer("amax", torch.zeros(fp8.amax_history, tensors), persistent=False)
        self.register_buffer("scale", torch.ones(tensors), persistent=False)

    def record(self, column: int, x: Tensor) -> None:
        current = self.amax[0, column]
        current.copy_(torch.maximum(current, amax_of(x)))

    def move(self) -> None:
        """The pass under way has ended: scales for the next, and a new row."""
        amax = self.amax[0].clone() if self._most_recent else self.amax.amax(0)
        wanted = (self._numerator / amax).clamp_max(torch.finfo(torch.float32).max)
        self.scale.copy_(torch.where((amax > 0) & amax.isfinite(), wanted, self.scale))
        self.amax.copy_(self.amax.roll(-1, 0))
        self.amax[0] = 0

    def fp8_scaling_state(self) -> dict[str, Tensor]:
        """See model/fp8/state.py."""
        return {"amax": self.amax, "scale": self.scale}


class DelayedScaling(nn.Module):
    """The scales of one linear.

    Passes without gradients, as in validation, are rounded with the scales that are there and leave no trace.
    """

    def __init__(self, fp8: ModelFp8, types: Types) -> None:
        super().__init__()
        self._types = types
        self.ahead, self.back = AmaxHistory(fp8, types.forward, 2), AmaxHistory(fp8, types.backward, 1)
        self._to_recompute: tuple[deque[Tensor], ...] = deque(), deque()
        """Scales of forward passes that will run once more, oldest first: of input and weight."""
        self.behind_backward: Callable[[], None] | None = None
        """Called where this linear's gradient is the last of a backward pass."""

    def input(self, input_NI: Tensor) -> Rounded:
        return by_scale(input_NI, self._scale_of_pass(INPUT, input_NI), self._types.forward)

    def weight(self, weight_OI: Tensor) -> Rounded:
        return by_scale(weight_OI, self._scale_of_pass(WEIGHT, weight_OI), self._types.forward)

    def _scale_of_pass(self, column: int, x: Tensor) -> Tensor:
        """Scalar; takes note of x, but once where megatron runs a forward pass again to save memory."""
        has_gradients, runs_twice = torch.is_grad_enabled(), is_checkpointing()
        if not self.training or not (has_gradients or runs_twice):
            return self.ahead.scale[column]
        if has_gradients and runs_twice:
            return self._to_recompute[column].popleft()
        self.ahead.record(column, x)
        if runs_twice:
            self._to_recompute[column].append(self.ahead.scale[column].clone())  # it moves before the second time
        return self.ahead.scale[column]

    def gradient(self, gradient_NO: Tensor) -> Rounded:
        self.back.record(0, gradient_NO)
        rounded = by_scale(gradient_NO, self.back.scale[0], self._types.backward)
        if self.behind_backward:
            self.behind_backward()
        return rounded


def move_with_passes(decoder: Any, group: dist.ProcessGroup) -> None:
    """Lets a stage's scales move: forward ones as its decoder has run, backward ones as the gradient comes to its first linear.

    group: of the ranks whose largest values count together.
    """
    scalings = [module for module in decoder.modules() if isinstance(module, DelayedScaling)]
    if not scalings:
        return

    def behind_forward(module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            move_together([scaling.ahead for scaling in scalings], group)

    decoder.register_forward_hook(behind_forward)
    first = decoder.layers[0].self_attention.linear_qkv.scaling
    first.behind_backward = partial(move_together, [scaling.back for scaling in scalings], group)


def move_together(histories: Sequence[AmaxHistory], group: dist.ProcessGroup) -> None:
    """One all-reduce for all of them."""
    current = torch.cat([history.amax[0] for history in histories])
    if group.size() > 1:
        dist.all_reduce(current, dist.ReduceOp.MAX, group=group)
    for history, amax in zip(histories, current.split([len(history.scale) for history in histories]), strict=True):
        history.amax[0] = amax
        history.move()
