"""dcp.save of tensors that come one at a time, from several processes into one checkpoint.

torch's own writer keeps every tensor of a file until the file is closed (torch 2.11 and 2.13, `tensor_dict` in filesystem.py): a planner
that resolves lazily does not bound the memory by itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

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

from minitron_megatron.errors import ArtifactError, MinitronError

TensorOf = Callable[[str], Tensor]
Place = tuple[str, tuple[tuple[int, int], ...]]
"""The checkpoint's key of a tensor, and (place, size) of the dimensions that it has ahead of the tensor's."""


def save_stream(folder: Path, shapes: dict[str, Tensor], tensor_of: TensorOf, places: Mapping[str, Place], group: dist.ProcessGroup | None) -> None:
    """Writes this process's tensors into a file of its own, and with the others of the group one .metadata.

    shapes: tensors of this process on the meta device, in the order in which tensor_of is asked for them. places: where each of them lies
    in the checkpoint. A mistake in any process is raised in all of them; ArtifactError where a file cannot be written.
    """
    try:
        dcp.save(shapes, storage_writer=_StreamWriter(folder), planner=_LazyPlanner(tensor_of, places), process_group=group, no_dist=group is None)
    except CheckpointException as failed:
        _raise_cause(failed)


class _LazyPlanner(DefaultSavePlanner):
    """Asks for each tensor when its turn to be written comes."""

    def __init__(self, tensor_of: TensorOf, places: Mapping[str, Place]) -> None:
        super().__init__()
        self._tensor_of = tensor_of
        self._places = places
        self._name_at: dict[tuple[str, torch.Size | None], str] = {}

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor; experts of a layer are chunks of one tensor, whichever process writes them."""
        plan = super().create_local_plan()
        items = [_placed(item, *self._places[item.index.fqn]) for item in plan.items]
        self._name_at = {(new.index.fqn, new.index.offset): old.index.fqn for old, new in zip(plan.items, items, strict=True)}
        self.plan = replace(plan, items=items, planner_data={item.index.fqn: (item.index.fqn,) for item in items})
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        name = self._name_at[index.fqn, index.offset]
        return self._tensor_of(name)[(None,) * len(self._places[name][1])]


def _placed(item: WriteItem, key: str, prefix: tuple[tuple[int, int], ...]) -> WriteItem:
    """The item of a whole tensor → that of its place in the checkpoint's tensor."""
    data = item.tensor_data
    if data is None or not prefix:
        return replace(item, index=replace(item.index, fqn=key))
    offsets = torch.Size((*(place for place, _ in prefix), *(0 for _ in data.size)))
    chunk = ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in prefix), *data.size)))
    whole = replace(data, chunk=chunk, size=torch.Size((*(size for _, size in prefix), *data.size)))
    return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=whole)


class _StreamWriter(FileSystemWriter):
    """One file a process; a tensor is let go as soon as it is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        try:
            results = _write_items(Path(self.path) / name, plan.items, planner) if plan.items else []
        except Exception as error:
            _raise_if_disk(error, Path(self.path) / name)
            raise
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _write_items(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    with path.open("wb") as file:
        results = [_write_item(file, path.name, item, planner) for item in items]
        file.flush()
        os.fsync(file.fileno())
    return results


def _write_item(file: Any, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
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
        mend = "free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend this"
        raise ArtifactError(f"{path}: cannot be written ({cause.strerror or cause}); {mend}, or set runs=FOLDER on another disk") from None


def _raise_cause(failed: CheckpointException) -> NoReturn:
    """What went wrong in the first process where something did, a user's mistake before a defect."""
    errors = [error for _, (error, _) in sorted(failed.failures.items())]
    mistakes = [error for error in errors if isinstance(error, MinitronError)]
    if mistakes:
        raise mistakes[0] from None
    raise errors[0] from failed
