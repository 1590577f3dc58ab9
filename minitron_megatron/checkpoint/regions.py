"""Regions of a torch_dist checkpoint's global tensors, read alone: slabs of rows without the rest of the chunks they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from minitron_megatron.checkpoint.file_bytes import read_into
from minitron_megatron.checkpoint.safe_metadata import SafeFileSystemReader
from minitron_megatron.checkpoint.slices import StoredSlices
from minitron_megatron.checkpoint.stored_tensor import StoredTensor, stored_tensor
from minitron_megatron.errors import CheckpointError


class Regions(Protocol):
    """Regions of global tensors, however they are stored."""

    folder: Path
    tensors: Mapping[str, TensorStorageMetadata]

    def read(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None) -> Tensor: ...


class TorchDistReader:
    """Regions of a checkpoint's global tensors, whatever layout wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise CheckpointError(f"{folder}: no torch_dist checkpoint (its .metadata is missing); was the job that wrote it stopped?")
        self._files = SafeFileSystemReader(folder)
        try:
            self._metadata = self._files.read_metadata()
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{folder}: its .metadata cannot be read ({_first_line(error)}); make the checkpoint anew") from None
        self._slices = StoredSlices()
        self._last_stored: tuple[tuple[str, int], StoredTensor | None] | None = None
        self._files.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors: Mapping[str, TensorStorageMetadata] = {
            key: entry for key, entry in self._metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None) -> Tensor:
        """The whole tensor of a key, or the region that starts at offsets and has these sizes."""
        entry = self.tensors[key]
        offsets = offsets or (0,) * len(entry.size)
        target = torch.empty(sizes or tuple(entry.size), dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), target.size())
        items = create_read_items_for_chunk_list(key, self._slices.around(key, entry, chunk), [chunk])
        try:
            others = [item for item in items if not self._read_directly(item, _region(target, item))]
            self._files.read_data(LoadPlan(others), _IntoTarget(target)).wait()
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            raise CheckpointError(f"{self.folder}: tensor {key} cannot be read ({_first_line(error)}); make the checkpoint anew") from None
        return target

    def _read_directly(self, item: ReadItem, goal: Tensor) -> bool:
        """Reads what an item asks for, and no other byte of its chunk; False where that is torch's own reader's business."""
        info: _StorageInfo = self._metadata.storage_data[item.storage_index]
        with (self.folder / info.relative_path).open("rb", buffering=0) as file:
            stored = self._stored(info, file.fileno())
            start = stored.run(item.storage_offsets, item.lengths) if stored and stored.dtype == goal.dtype else None
            if start is None:
                return False
            piece = goal if goal.is_contiguous() else torch.empty(goal.shape, dtype=goal.dtype)
            read_into(piece, file.fileno(), info.offset + start)
        if piece is not goal:
            goal.copy_(piece)
        return True

    def _stored(self, info: _StorageInfo, file: int) -> StoredTensor | None:
        """Of the chunk that was asked for last, as the slabs of one come one after another."""
        place = (info.relative_path, info.offset)
        if self._last_stored is None or self._last_stored[0] != place:
            plain = not getattr(info, "transform_descriptors", None)
            self._last_stored = place, stored_tensor(file, info.offset, info.length) if plain else None
        return self._last_stored[1]


def _region(target: Tensor, item: ReadItem) -> Tensor:
    """The part of the target that an item fills."""
    for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        target = target.narrow(dim, offset, length)
    return target


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _IntoTarget(DefaultLoadPlanner):
    """Puts every piece that is read into one target tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return _region(self._target, read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
