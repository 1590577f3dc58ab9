"""dcp.save of tensors that come one at a time, from several processes into one checkpoint.

torch's own writer keeps every tensor of a file until the file is closed (torch 2.11 and 2.13, `tensor_dict` in filesystem.py): a planner
that resolves lazily does not bound the memory by itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from minitron_megatron.errors import ArtifactError, MinitronError

TensorOf = Callable[[str], Tensor]


def save_stream(folder: Path, shapes: dict[str, Tensor], tensor_of: TensorOf, group: dist.ProcessGroup | None) -> None:
    """Writes this process's tensors into a file of its own, and with the others of the group one .metadata.

    shapes: tensors of this process on the meta device, in the order in which tensor_of is asked for them. A mistake in any process
    is raised in all of them; ArtifactError where a file cannot be written.
    """
    try:
        dcp.save(shapes, storage_writer=_StreamWriter(folder), planner=_LazyPlanner(tensor_of), process_group=group, no_dist=group is None)
    except CheckpointException as failed:
        _raise_cause(failed)


class _LazyPlanner(DefaultSavePlanner):
    """Asks for each tensor when its turn to be written comes."""

    def __init__(self, tensor_of: TensorOf) -> None:
        super().__init__()
        self._tensor_of = tensor_of

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._tensor_of(index.fqn)


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
