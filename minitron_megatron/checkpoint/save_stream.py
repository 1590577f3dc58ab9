"""dcp.save of tensors that come one at a time, from several processes into one checkpoint.

torch's own writer keeps every tensor of a file until the file is closed (torch 2.11 and 2.13, `tensor_dict` in filesystem.py): a planner
that resolves lazily does not bound the memory by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from minitron_megatron.checkpoint.file_bytes import WriteBehind, unwritable
from minitron_megatron.checkpoint.slabs import Slab
from minitron_megatron.errors import MinitronError

Place = tuple[str, tuple[tuple[int, int], ...]]
"""The checkpoint's key of a tensor, and (place, size) of the dimensions that it has ahead of the tensor's."""


def save_stream(
    folder: Path,
    slabs: Sequence[Slab],
    next_tensor: Callable[[], Tensor],
    *,
    places: Mapping[str, Place],
    group: dist.ProcessGroup | None,
    on_bytes: Callable[[int], None],
) -> None:
    """Writes this process's slabs, a chunk each, into a file of its own, and with the others of the group one .metadata.

    next_tensor: called once for each slab, in their order. places: name of a tensor → where it lies in the checkpoint. on_bytes: told of
    what has been written. A mistake in any process is raised in all of them; ArtifactError where a file cannot be written.
    """
    shapes = {slab.row.name: torch.empty(slab.shape, dtype=slab.dtype, device="meta") for slab in slabs}
    planner, writer = _LazyPlanner(slabs, next_tensor, places), _StreamWriter(folder, on_bytes)
    try:
        dcp.save(shapes, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as failed:
        _raise_cause(failed)


class _LazyPlanner(DefaultSavePlanner):
    """Asks for each slab when its turn to be written comes."""

    def __init__(self, slabs: Sequence[Slab], next_tensor: Callable[[], Tensor], places: Mapping[str, Place]) -> None:
        super().__init__()
        self._slabs = slabs
        self._next_tensor = next_tensor
        self._places = places
        self._order: dict[tuple[str, torch.Size | None], int] = {}
        self._turn = 0

    def create_local_plan(self) -> SavePlan:
        """One item for each slab; experts of a layer are chunks of one tensor, whichever process writes them."""
        whole = {item.index.fqn: item for item in super().create_local_plan().items}
        items = [_placed(whole[slab.row.name], slab, *self._places[slab.row.name]) for slab in self._slabs]
        self._order = {(item.index.fqn, item.index.offset): number for number, item in enumerate(items)}
        self.plan = SavePlan(items, planner_data={item.index.fqn: (item.index.fqn,) for item in items})
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        if self._order[index.fqn, index.offset] != self._turn:
            raise RuntimeError(
                f"{index.fqn} at {index.offset} is asked for out of turn: torch writes a plan's items in another order than it has them"
            )
        slab = self._slabs[self._turn]
        self._turn += 1
        return self._next_tensor()[(None,) * len(self._places[slab.row.name][1])]


def _placed(item: WriteItem, slab: Slab, key: str, prefix: tuple[tuple[int, int], ...]) -> WriteItem:
    """The item of a whole tensor → that of a slab at its place in the checkpoint's tensor."""
    data = item.tensor_data
    if data is None or (slab.is_whole and not prefix):
        return replace(item, index=replace(item.index, fqn=key))
    offsets = torch.Size((*(place for place, _ in prefix), slab.rows.start, *(0 for _ in slab.shape[1:])))
    chunk = ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in prefix), len(slab.rows), *slab.shape[1:])))
    whole = replace(data, chunk=chunk, size=torch.Size((*(size for _, size in prefix), *slab.shape)))
    return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=whole)


class _StreamWriter(FileSystemWriter):
    """One file a process; a tensor is let go as soon as it is written."""

    def __init__(self, folder: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(folder)
        self._on_bytes = on_bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        try:
            results = _write_items(Path(self.path) / name, plan.items, planner, self._on_bytes) if plan.items else []
        except Exception as error:
            _raise_if_disk(error, Path(self.path) / name)
            raise
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _write_items(path: Path, items: list[WriteItem], planner: SavePlanner, on_bytes: Callable[[int], None]) -> list[WriteResult]:
    with path.open("wb") as file:
        behind, results = WriteBehind(file.fileno()), []
        for item in items:
            results.append(_write_item(file, path.name, item, planner))
            behind.add(results[-1].size_in_bytes)
            on_bytes(results[-1].size_in_bytes)
        file.flush()
        os.fsync(file.fileno())
    return results


def _write_item(file: BinaryIO, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    start = file.tell()
    tensor: Any = planner.resolve_data(item)
    # a view would be written with all the storage it is a part of
    torch.save(tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone(), file)
    length = file.tell() - start
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, start, length))


def _raise_if_disk(error: BaseException, path: Path) -> None:
    """ArtifactError for what the system said of the file, also where torch.save's own complaint came on top of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError | MinitronError):
        cause = cause.__context__
    if isinstance(cause, OSError):
        raise unwritable(path, cause) from None


def _raise_cause(failed: CheckpointException) -> NoReturn:
    """What went wrong in the first process where something did, a user's mistake before a defect."""
    errors = [error for _, (error, _) in sorted(failed.failures.items())]
    mistakes = [error for error in errors if isinstance(error, MinitronError)]
    if mistakes:
        raise mistakes[0] from None
    raise errors[0] from failed
