"""A checkpoint's .metadata without the code that a pickle can carry: only the classes that torch and megatron-core put there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

TENSORS, OLD_TENSORS = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
PLANS, MEGATRON = "torch.distributed.checkpoint.planner", "megatron.core.dist_checkpointing.strategies.torch"
NAMES = {
    TENSORS: ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta"),
    # megatron-core keeps its plan of the writing beside the tensors
    PLANS: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    MEGATRON: ("MCoreMetadata", "MCoreSavePlan"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
}
MOVED = ("TensorProperties", "MEM_FORMAT_ENCODING", "_MEM_FORMAT_ENCODING")
"""In one of two modules, by torch's release."""


class SafeFileSystemReader(FileSystemReader):
    """torch's reader of a checkpoint folder, whose own read_metadata would run what .metadata asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises pickle.UnpicklingError for anything that torch_dist checkpoints do not hold, and for files outside the folder."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _KnownClasses(file).load()
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"it asks for the file {stored.relative_path!r}, which is not one of the folder's own")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _KnownClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_moved = name in MOVED and module in (TENSORS, OLD_TENSORS)
        if is_type or is_moved or name in NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
