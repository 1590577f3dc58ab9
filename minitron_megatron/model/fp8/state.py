"""What delayed scaling remembers: the largest values of earlier passes and the scales that follow from them.

A module that keeps some has a method `fp8_scaling_state() -> dict[str, Tensor]`: its own tensors by name, to be read and to be filled
in place. Each is equal on all ranks of the amax group, so that a checkpoint needs one copy whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from minitron_megatron.model.fp8.engine_scaling import engine_scaling_state
from minitron_megatron.model.gpt import StageModel

PREFIX = "fp8.layers."
"""Of every name in a checkpoint."""


def scaling_state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors by name, without those of its submodules; none where it remembers nothing."""
    state: Any = getattr(module, "fp8_scaling_state", None)
    return state() if state else engine_scaling_state(module)


def scaling_state(model: StageModel) -> dict[str, Tensor]:
    """`fp8.layers.LAYER.MODULE.NAME` → tensor, of this process's layers; LAYER counts over the whole model, from 0.

    An expert's module is named by its place among the experts of this rank.
    """
    return {
        f"{PREFIX}{layer.layer_number - 1}.{path}.{name}": tensor
        for layer in model.layers()
        for path, module in layer.named_modules()
        for name, tensor in scaling_state_of(module).items()
    }


@contextmanager
def unmoved_scaling(model: StageModel) -> Iterator[None]:
    """Leaves it as it was: a validation is no step.

    Transformer Engine notes largest values without gradients too, and takes them up behind the next training pass; a run that continues
    validates first, and would be another one than the run that never ended.
    """
    before = {name: tensor.clone() for name, tensor in scaling_state(model).items()}
    try:
        yield
    finally:
        for name, tensor in scaling_state(model).items():
            tensor.copy_(before[name])
