"""Tensor-parallel exchange that runs while matrix products do: Transformer Engine's user buffers (training.overlap_tensor_parallel).

Transformer Engine has one set of buffers a process, of one shape, and megatron-core 0.16.1 never makes them: they are made here, for the model that
is trained. Each exchange of a layer goes through the buffer of its name, in parts, beside the product that it feeds or that feeds it.

Legend: S sequence, B samples of a micro-batch, D hidden, C context-parallel size.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minitron_megatron.errors import PlatformError
from minitron_megatron.model.gpt import StageModel

OVERLAPPED = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop")
"""Transformer Engine's attributes of a linear layer: whether its forward pass exchanges through a buffer."""


@contextmanager
def user_buffers(model: StageModel, *, samples: int, sequence: int) -> Iterator[None]:
    """Inside, the model's layers find their buffers, made for micro-batches of samples × sequence; nothing where it overlaps nothing.

    Every process calls this. Raises PlatformError where the machine has no multicast between its GPUs.
    """
    if not model.config.tp_comm_overlap:
        yield
        return
    engine = importlib.import_module("transformer_engine.pytorch.module.base")
    _require_multicast()
    engine.initialize_ub(
        shape=buffer_shape(model, samples=samples, sequence=sequence),
        tp_size=model.layout.tensor,
        quantization_modes=[engine.UserBufferQuantizationMode[name] for name in quantization_modes(model.config)],
        dtype=model.config.params_dtype,
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        engine.destroy_ub()


def buffer_shape(model: StageModel, *, samples: int, sequence: int) -> list[int]:
    """[S · B / C, D] of what a layer's linears exchange."""
    return [sequence * samples // model.config.context_parallel_size, model.config.hidden_size]


def quantization_modes(config: Any) -> list[str]:
    """Names of Transformer Engine's UserBufferQuantizationMode: of FP8 layers, and of those that compute in bf16."""
    if not config.fp8:
        return ["NONE"]
    return ["FP8", "NONE"] if config.first_last_layers_bf16 else ["FP8"]


@contextmanager
def without_buffers(model: StageModel) -> Iterator[None]:
    """Inside, forward passes exchange through NCCL: those of a validation have another shape than the buffers."""
    found = [(module, name) for chunk in model.chunks for module in chunk.modules() for name in OVERLAPPED if getattr(module, name, False)]
    for module, name in found:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in found:
            setattr(module, name, True)


def _require_multicast() -> None:
    """Transformer Engine asserts it."""
    kernels = importlib.import_module("transformer_engine_torch")
    if not kernels.device_supports_multicast() and os.environ.get("UB_SKIPMC", "0") != "1":
        raise PlatformError(
            "training.overlap_tensor_parallel=true: these GPUs, or their driver, have no CUDA multicast, which Transformer Engine's buffers use; "
            "set UB_SKIPMC=1 in the environment to have them go by CUDA IPC, or training.overlap_tensor_parallel=false"
        )
