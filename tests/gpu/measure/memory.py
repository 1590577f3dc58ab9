"""What a frozen teacher takes of the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.data.batches import Batch
from minitron_megatron.model.run import forward_only

from ..houses import ROOT
from ..place import allocated_bytes, place
from ..setting import Setting


def built(setting: Setting, folder: Path, *, model: str, layers: int | None = None, length: int = 4096) -> dict[str, Any]:
    """Bytes of a teacher with its embedding and output layer, as built; with those of a forward pass of one sample behind it, and its peak.

    model: of configs/architectures. layers: fewer than it has, for a machine that is small.
    """
    arch = source_architecture("nowhere", str(ROOT / "configs" / "architectures" / f"{model}.json"))
    arch = arch.resized(layers=layers) if layers else arch
    with place(setting) as here:
        before = allocated_bytes([], here.platform)
        teacher = here.build(arch, output_layer=ColumnParallelLinear, weights=bool(setting.fp8))
        weights = allocated_bytes([teacher], here.platform) - before
        forward_only(teacher, [_zeros(length).to(here.platform.device)], consume=lambda hidden, batch: None)
        behind = allocated_bytes([teacher], here.platform) - before
        return {"weights": weights, "behind_a_pass": behind, "peak": here.platform.peak_memory_bytes() - before, "layers": arch.layers}


def _zeros(length: int) -> Batch:
    tokens = torch.zeros(1, length, dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones(1, length), torch.arange(length)[None], torch.zeros(1, dtype=torch.int64))
