"""Megatron's torch_dist checkpoints as streams: one tensor at a time in, one tensor at a time out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.digest import combined_digest, tensor_digest
from minitron_megatron.checkpoint.safe_metadata import SafeFileSystemReader
from minitron_megatron.checkpoint.save_stream import Place, save_stream
from minitron_megatron.checkpoint.slices import StoredSlices
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.errors import CheckpointError

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""Keys of the model; optimizer state and random states lie beside them and are left alone."""
WRAPPERS = ("", "model.", "model.module.", "module.")
"""What a checkpoint may have ahead of each of the model's keys: NeMo's and that of half-precision modules."""


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
        self._files.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._slices = StoredSlices()
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
            self._files.read_data(LoadPlan(items), _IntoTarget(target)).wait()
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            raise CheckpointError(f"{self.folder}: tensor {key} cannot be read ({_first_line(error)}); make the checkpoint anew") from None
        return target


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _IntoTarget(DefaultLoadPlanner):
    """Puts every piece that is read into one target tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = self._target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            region = region.narrow(dim, offset, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class MegatronSource:
    """Tensors of the table out of a torch_dist checkpoint: ours, Megatron-LM's or Megatron-Bridge's.

    Found by name under one key per layer or stacked [L, …] keys, plain or Transformer Engine's fused names, with or without NeMo's `model.`;
    a padded vocabulary is cut. reader: of a checkpoint in another form.
    """

    def __init__(self, folder: Path, arch: Architecture, reader: Regions | None = None) -> None:
        self.arch = arch
        self._reader: Regions = reader or TorchDistReader(checkpoint_folder(folder))
        self._wrapper = next((ahead for ahead in WRAPPERS if f"{ahead}embedding.word_embeddings.weight" in self._reader.tensors), "")
        self._check()

    def dtype(self, row: TensorRow) -> torch.dtype:
        key, _ = self._find(row)
        return self._reader.tensors[key].properties.dtype

    def read(self, row: TensorRow, rows: range | None = None) -> Tensor:
        """The Megatron tensor of a row of the table, vocabulary not padded, on the CPU, in the checkpoint's own type.

        rows: only these of its first dimension.
        """
        key, prefix = self._find(row)
        shape = row.shape(self.arch)
        rows = range(shape[0]) if rows is None else rows
        shape, places = (len(rows), *shape[1:]), tuple(place for place, _ in prefix)
        offsets = (*places, rows.start, *(0 for _ in shape[1:]))
        return self._reader.read(key, offsets, (*(1 for _ in places), *shape)).view(shape)

    def _find(self, row: TensorRow) -> Place:
        """The checkpoint's key, and (place, size) of the dimensions that it has ahead of the row's: stacked layers, experts."""
        for name in filter(None, (row.key, row.plain_name)):
            key = self._wrapper + name
            if key in self._reader.tensors:
                return key, row.prefix(self.arch)
            stacked = key.replace(f".layers.{row.layer}.", ".layers.")
            if row.layer is not None and stacked in self._reader.tensors:
                return stacked, ((row.layer, self.arch.layers), *row.prefix(self.arch))
        raise CheckpointError(f"{self._reader.folder}: tensor {row.name} is missing; is the checkpoint of another model?")

    def _check(self) -> None:
        known: set[str] = set()
        for row in tensor_table(self.arch):
            key, prefix = self._find(row)
            known.add(key)
            ahead = tuple(size for _, size in prefix)
            expected, found = (*ahead, *row.shape(self.arch)), tuple(self._reader.tensors[key].size)
            padded = row.axes[0] == "V" and found[0] >= expected[0] and found[1:] == expected[1:]
            if found != expected and not padded:
                raise CheckpointError(
                    f"{self._reader.folder}: tensor {key} has shape {list(found)}, expected {list(expected)}; is it of another model?"
                )
        for key in sorted(self._reader.tensors.keys() - known):
            if key.removeprefix(self._wrapper).startswith(MODEL_PREFIXES):
                raise CheckpointError(
                    f"{self._reader.folder}: tensor {key} is not part of family '{self.arch.family_name}' with {self.arch.layers} layers"
                )


def checkpoint_folder(folder: Path) -> Path:
    """Megatron-LM and Megatron-Bridge keep checkpoints in iter_0000100 folders and name the latest in a text file."""
    latest = folder / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return folder
    iteration = latest.read_text().strip()
    if iteration != "release" and not iteration.isdecimal():
        raise CheckpointError(f"{latest}: neither an iteration nor 'release' (found {iteration!r}); name one of the iter_… folders as model.path")
    return folder / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")


def write_torch_dist(
    folder: Path,
    rows: list[TensorRow],
    arch: Architecture,
    *,
    dtype: Callable[[TensorRow], torch.dtype],
    read: Callable[[TensorRow], Tensor],
    group: dist.ProcessGroup | None = None,
    place: Callable[[TensorRow, Architecture], Place] | None = None,
) -> str:
    """Streams tensors into a torch_dist checkpoint that megatron loads under any layout; returns the digest of all weights.

    read is called once for each row, in the rows' order, one tensor in memory at a time. Several processes share the rows: all call this with
    the same arguments and a group that carries CPU tensors; the checkpoint's content and the digest are those of one process.
    place: where a row lies in the checkpoint, by default under its own key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    shapes = {row.name: torch.empty(row.shape(arch), dtype=dtype(row), device="meta") for row in rows}
    mine = {row.name: row for row in shares([(row, shapes[row.name].nbytes) for row in rows], size)[rank]}
    digests: dict[str, bytes] = {}

    def tensor_of(name: str) -> Tensor:
        tensor = read(mine[name]).contiguous()
        digests[name] = tensor_digest(name, tensor)
        return tensor

    places = {name: place(row, arch) if place else (row.key, row.prefix(arch)) for name, row in mine.items()}
    save_stream(folder, {name: shapes[name] for name in mine}, tensor_of, places, group)
    if rank == 0:
        (folder / "metadata.json").write_text(json.dumps(BACKEND))
        torch.save({}, folder / "common.pt")
    every = _of_all(digests, group)
    return combined_digest(every[row.name] for row in rows)


def shares(sized_rows: list[tuple[TensorRow, int]], processes: int) -> list[list[TensorRow]]:
    """Rows of each process, in the table's order: the largest first to the one that has the fewest bytes (lowest rank among equals)."""
    load, owner = [0] * processes, {}
    for row, size in sorted(sized_rows, key=lambda sized: -sized[1]):
        owner[row.name] = load.index(min(load))
        load[owner[row.name]] += size
    return [[row for row, _ in sized_rows if owner[row.name] == rank] for rank in range(processes)]


def _of_all(digests: dict[str, bytes], group: dist.ProcessGroup | None) -> dict[str, bytes]:
    if group is None:
        return digests
    gathered: list[dict[str, bytes]] = [{}] * group.size()
    dist.all_gather_object(gathered, digests, group=group)
    return {name: digest for part in gathered for name, digest in part.items()}


def weights_digest(source: MegatronSource) -> str:
    """The same digest, of a checkpoint on disk."""
    return combined_digest(tensor_digest(row.name, source.read(row)) for row in tensor_table(source.arch))


def checkpoint_bytes(rows: list[TensorRow], arch: Architecture, dtype: Callable[[TensorRow], torch.dtype]) -> int:
    """Bytes of the tensors, for the check of disk space before a stream starts."""
    return sum(prod(row.shape(arch)) * dtype(row).itemsize for row in rows)
