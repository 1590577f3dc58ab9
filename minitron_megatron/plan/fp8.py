"""Bytes of weights in FP8, as Transformer Engine 2.11 lays out each scaling's tensors (`make_empty` and `get_scale_shape` of pytorch/tensor/).

A frozen teacher, built without gradients, has each matrix once, along its rows. What is trained has it along its columns too, for the backward pass:
of FP8 weights that is the weight itself, of bf16 weights a cast that is kept from one optimizer step to the next.
"""

from __future__ import annotations

from collections.abc import Iterable

from minitron_megatron.config.fp8 import Fp8, ModelFp8, Scaling
from minitron_megatron.errors import PlatformError
from minitron_megatron.plan.gpus import Accelerator
from minitron_megatron.plan.weights import Weight
from minitron_megatron.platform.fp8_support import Fp8Machine, obstacles

CUDA, TRANSFORMER_ENGINE = (13, 0), (2, 11)
FP32 = 4
BLOCK, MX_BLOCK, FP4_BLOCK = 128, 32, 16
"""Values to a scale; blockwise scales a weight by squares of such a side."""


def require_scalings(fp8: Fp8, gpu: Accelerator) -> None:
    """Raises PlatformError where the GPU does not multiply by one of them, with the CUDA and the Transformer Engine of the image."""
    problems = obstacles(fp8, Fp8Machine(gpu.name, gpu.capability, CUDA, TRANSFORMER_ENGINE))
    if problems:
        raise PlatformError("\n".join(problems))


def is_fp8(weight: Weight, fp8: ModelFp8 | None, layers: int) -> bool:
    """Whether a matrix of a model of so many layers is multiplied in FP8."""
    return fp8 is not None and weight.sides is not None and fp8.covers(weight.layer, layers)


def frozen_bytes(weights: Iterable[Weight], fp8: ModelFp8 | None, layers: int, width: int) -> int:
    """Of a model that is not trained; width: bytes of what is not FP8."""
    return sum(_frozen(weight, fp8, layers, width) for weight in weights)


def cast_bytes(weights: Iterable[Weight], fp8: ModelFp8 | None, layers: int) -> int:
    """What training keeps beside bf16 weights, or beside the rows of FP8 ones."""
    found = 0
    for weight in weights:
        if fp8 and weight.sides and fp8.covers(weight.layer, layers):
            rows, columns = along_rows(fp8.scaling, *weight.sides), along_columns(fp8.scaling, *weight.sides)
            found += columns + (rows - weight.elements if fp8.weights else rows)  # a byte of each element is the weight, the scales are beside it
    return found


def along_rows(scaling: Scaling, rows: int, columns: int) -> int:
    """Bytes of a matrix and its scales as the forward pass reads it."""
    match scaling:
        case "blockwise":
            return rows * columns + FP32 * _up(rows, BLOCK) * _padded(_up(columns, BLOCK), 4)
        case "mxfp8":
            return rows * columns + _padded(rows, 128) * _padded(columns // MX_BLOCK, 4)
        case "nvfp4":
            return rows * columns // 2 + _padded(rows, 128) * _padded(columns // FP4_BLOCK, 4) + FP32
    return rows * columns + FP32


def along_columns(scaling: Scaling, rows: int, columns: int) -> int:
    """The same as the backward pass reads it: transposed; of one scale for all values, without a further one."""
    match scaling:
        case "blockwise" | "nvfp4":
            return along_rows(scaling, columns, rows)
        case "mxfp8":
            return rows * columns + _padded(rows // MX_BLOCK, 4) * _padded(columns, 128)
    return rows * columns


def _frozen(weight: Weight, fp8: ModelFp8 | None, layers: int, width: int) -> int:
    if fp8 and weight.sides and fp8.covers(weight.layer, layers):
        return along_rows(fp8.scaling, *weight.sides)
    return weight.elements * width


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _padded(number: int, multiple: int) -> int:
    return _up(number, multiple) * multiple
