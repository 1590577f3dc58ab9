"""Layers of different widths as one width: any rows of the widened tensors are those of the whole ones."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.convert.widen import WidenedSource

UNEVEN = Architecture("llama", 3, 16, 8, 2, 4, 24, 31, False, 64, 1e-6, 10000.0).resized(ffn=[24, 8, 15])
GATELESS = Architecture("nemotron", 3, 16, 8, 2, 4, 24, 31, False, 64, 1e-5, 10000.0, rotary_share=0.5).resized(ffn=[24, 8, 15])


def random(row: TensorRow, arch: Architecture) -> Tensor:
    return torch.randn(row.shape(arch), generator=torch.Generator().manual_seed(zlib.crc32(row.name.encode())))


def widened_by_hand(row: TensorRow, tensor: Tensor, width: int) -> Tensor:
    """Zeros behind each matrix's neurons."""
    if row.axes == ("D", "F"):
        return torch.cat([tensor, torch.zeros(len(tensor), width - tensor.shape[1])], dim=1)
    if row.axes[0] not in ("2F", "F"):
        return tensor
    halves = tensor.chunk(2) if row.axes[0] == "2F" else [tensor]
    return torch.cat([part for half in halves for part in (half, torch.zeros(width - len(half), tensor.shape[1]))])


@pytest.mark.parametrize("arch", [UNEVEN, GATELESS], ids=["gated", "gateless"])
def test_rows_of_a_widened_tensor_are_those_of_the_whole_one(arch: Architecture, tmp_path: Path) -> None:
    rows = tensor_table(arch)
    write_torch_dist(tmp_path / "x", rows, arch, dtype=lambda row: torch.float32, read=lambda row: random(row, arch))
    source = WidenedSource(MegatronSource(tmp_path / "x", arch), arch.resized(ffn=24))
    for row in rows:
        expected = widened_by_hand(row, random(row, arch), 24)
        assert torch.equal(source.read(row), expected), row.name
        for start in range(len(expected)):
            part = range(start, min(start + 7, len(expected)))
            assert torch.equal(source.read(row, part), expected[part.start : part.stop]), row.name
