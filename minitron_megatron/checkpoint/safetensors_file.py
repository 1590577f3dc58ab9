"""A safetensors file whose tensors come in slabs: the same bytes as safetensors.torch.save_file writes, without all of them in memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from minitron_megatron.checkpoint.file_bytes import WriteBehind, write_from

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
LENGTH = struct.Struct("<Q")
"""Of the header, ahead of it."""


def data_offsets(path: Path) -> dict[str, int]:
    """Name of a tensor → place of its first byte in the file; the file is one that safetensors has opened."""
    with path.open("rb") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        header = json.loads(file.read(length))
    return {name: LENGTH.size + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class SafetensorsFile:
    """Written slab by slab; on the disk when the context is left."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """tensors: types and shapes of all."""
        self._path, self._tensors = path, tensors
        self._offsets: dict[str, int] = {}
        header = self._header()
        self._file = path.open("wb", buffering=0)
        self._behind = WriteBehind(self._file.fileno())
        self._file.write(header)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        """Contiguous rows of a tensor, from this row on."""
        dtype, shape = self._tensors[name]
        if (rows.dtype, tuple(rows.shape[1:])) != (dtype, shape[1:]):
            raise ValueError(f"{name}: rows of {rows.dtype} {list(rows.shape)} for a tensor of {dtype} {list(shape)}")
        write_from(rows, self._file.fileno(), self._offsets[name] + first_row * prod(shape[1:]) * dtype.itemsize)
        self._behind.add(rows.nbytes)

    def _header(self) -> bytes:
        """Wide types come first, so that every tensor is aligned; names in their order, as safetensors has them."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(self._tensors, key=lambda name: (-self._tensors[name][0].itemsize, TYPES[self._tensors[name][0]], name)):
            dtype, shape = self._tensors[name]
            self._offsets[name], end = end, end + prod(shape) * dtype.itemsize
            entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [self._offsets[name], end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {name: LENGTH.size + len(text) + offset for name, offset in self._offsets.items()}
        return LENGTH.pack(len(text)) + text
