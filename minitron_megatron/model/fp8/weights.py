"""Weights that are FP8 themselves: what they take, and the more precise values that they stand for.

Such a weight is a tensor of Transformer Engine's that says bf16 of itself and holds bytes and scales. With TE absent there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

INITIAL_VALUE = "_high_precision_init_val"
"""Transformer Engine's attribute of an FP8 weight that was built with gradients enabled: what its fp32 main copy begins with."""


def are_rounded(config: TransformerConfig) -> bool:
    """Whether a model's weights are FP8 (or FP4) and its fp32 main copy is what they stand for."""
    return bool(config.fp8_param or config.fp4_param)


def weight_bytes(weights: Iterable[Tensor]) -> int:
    """Memory that weights take, each once: of an FP8 weight its bytes, the transposed copy where there is one, and its scales."""
    storages = {part.data_ptr(): part.nbytes for weight in weights for part in _parts(weight)}
    return sum(storages.values())


def _parts(weight: Tensor) -> list[Tensor]:
    return [value for value in vars(weight).values() if isinstance(value, Tensor)] if is_float8tensor(weight) else [weight]


def set_initial_values(named: Iterable[tuple[str, Tensor]], loaded: Mapping[str, Any]) -> None:
    """Gives FP8 weights in training the values that a checkpoint has for them.

    The fp32 main copy is made from these: made from the weights it would begin with what FP8 rounded away, and without this with whatever memory
    held as the model was built.
    """
    for name, weight in named:
        if name in loaded and hasattr(weight, INITIAL_VALUE):
            setattr(weight, INITIAL_VALUE, loaded[name].detach().cpu().contiguous())


def put_plain_values(state: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts host copies in bf16 in the place of FP8 weights in the chunks' sharded states, which are about to be written.

    A file of Transformer Engine's own tensors would be read by nobody: torch loads no foreign classes.
    """
    for entry in (entry for chunk in state.values() for entry in chunk.values()):
        if is_float8tensor(entry.data):
            entry.data = entry.data.dequantize().cpu()


def complete_copies(weights: Iterable[Tensor]) -> None:
    """Makes the transposed copies of FP8 weights anew whose bytes were gathered.

    megatron-core 0.16.1 leaves that out where it gathers at once although overlap_param_gather is set: backward would use the last step's.
    """
    rounded = [weight for weight in weights if is_float8tensor(weight)]
    if rounded:
        with torch.no_grad():
            post_all_gather_processing(rounded)
