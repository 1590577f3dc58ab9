"""The weights of a model in training as they are published: those of its fp32 main copy, where its own are FP8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory

from minitron_megatron.checkpoint.sharded import model_state
from minitron_megatron.model.fp8.weights import are_rounded
from minitron_megatron.training.optimizer_state import MAIN_PARAMETER, OptimizerState
from minitron_megatron.training.student import Student


def published_state(student: Student) -> dict[str, Any]:
    """Sharded state to be saved: weights alone, in the type that the model computes in; every process calls this.

    FP8 weights are rounded by up to 1/16 of their size (e4m3, 3 bits of mantissa): nobody who loads the result should get those.
    """
    config = student.model.config
    return main_state(student, config.params_dtype) if are_rounded(config) else model_state(student.model)


def main_state(student: Student, dtype: torch.dtype) -> dict[str, Any]:
    """The model's state with the fp32 main copy, rounded to dtype, in place of every weight that has one."""
    weights = model_state(student.model)
    tensors = OptimizerState(student.optimizer, weights, loading=False).tensors().values()
    main = [_as_weight(entry, dtype) for entry in tensors if entry.key.startswith(MAIN_PARAMETER)]
    replaced = {entry.key for entry in main}
    rest = {
        name: {key: entry for key, entry in chunk.items() if not (isinstance(entry, ShardedBase) and entry.key in replaced)}
        for name, chunk in weights.items()
    }
    # the names within are no part of what is written, and begin as the weights' own do: by those a caller leaves some out
    return {**rest, "main": {f"{entry.key} {number}": entry for number, entry in enumerate(main)}}


def _as_weight(entry: Any, dtype: torch.dtype) -> ShardedBase:
    key, data = entry.key.removeprefix(MAIN_PARAMETER), entry.data.to(dtype)
    if isinstance(entry, ShardedTensorFactory):  # gate and up in one weight: its parts take the type of the data
        return replace(entry, key=key, data=data)
    return replace(entry, key=key, data=data, dtype=dtype)
