"""Megatron's torch_dist checkpoints as streams: one slab of a tensor at a time in, one at a time out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.digest import Digests, combined_digest
from minitron_megatron.checkpoint.read_ahead import read_ahead
from minitron_megatron.checkpoint.regions import Regions, TorchDistReader
from minitron_megatron.checkpoint.save_stream import Place, save_stream
from minitron_megatron.checkpoint.slabs import Slab, slabs_of
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.errors import CheckpointError

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""Keys of the model; optimizer state and random states lie beside them and are left alone."""
WRAPPERS = ("", "model.", "model.module.", "module.")
"""What a checkpoint may have ahead of each of the model's keys: NeMo's and that of half-precision modules."""


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
    read: Callable[..., Tensor],
    group: dist.ProcessGroup | None = None,
    place: Callable[[TensorRow, Architecture], Place] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str:
    """Streams tensors into a torch_dist checkpoint that megatron loads under any layout; returns the digest of all weights.

    read is called in the rows' order by a thread that is a little ahead: read(row) for a tensor that fits into a slab, read(row, range) for
    each slab of a larger one. Several processes share the rows: all call this with the same arguments and a group that carries CPU tensors; the
    checkpoint's content and the digest are those of one process. place: where a row lies in the checkpoint, by default under its own key.
    on_bytes: told of what this process has written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    mine = shares([(row, prod(row.shape(arch)) * dtype(row).itemsize) for row in rows], size)[rank]
    slabs = list(slabs_of(mine, arch, dtype))
    places = {row.name: place(row, arch) if place else (row.key, row.prefix(arch)) for row in mine}

    def read_slab(slab: Slab) -> Tensor:
        return (read(slab.row) if slab.is_whole else read(slab.row, slab.rows)).contiguous()

    with closing(read_ahead(slabs, read_slab)) as stream, Digests() as digests:

        def next_tensor() -> Tensor:
            slab, tensor = next(stream)
            digests.add(slab, tensor)
            return tensor

        save_stream(folder, slabs, next_tensor, places=places, group=group, on_bytes=on_bytes)
        own = digests.all()
    if rank == 0:
        (folder / "metadata.json").write_text(json.dumps(BACKEND))
        torch.save({}, folder / "common.pt")
    every = _of_all(own, group)
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
    rows = tensor_table(source.arch)
    slabs = slabs_of(rows, source.arch, source.dtype)
    with closing(read_ahead(slabs, lambda slab: source.read(slab.row, slab.rows))) as stream, Digests() as digests:
        for slab, tensor in stream:
            digests.add(slab, tensor)
        every = digests.all()
    return combined_digest(every[row.name] for row in rows)


def checkpoint_bytes(rows: list[TensorRow], arch: Architecture, dtype: Callable[[TensorRow], torch.dtype]) -> int:
    """Bytes of the tensors, for the check of disk space before a stream starts."""
    return sum(prod(row.shape(arch)) * dtype(row).itemsize for row in rows)
