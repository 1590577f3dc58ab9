"""Hugging Face checkpoints: streaming safetensors, one file or sharded with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import reduce
from itertools import chain, groupby, islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.file_bytes import read_into, unwritable
from minitron_megatron.checkpoint.read_ahead import read_ahead
from minitron_megatron.checkpoint.safetensors_file import SafetensorsFile, data_offsets
from minitron_megatron.checkpoint.slabs import Slab, slabs_of
from minitron_megatron.checkpoint.tensors import TensorRow, hf_shapes, pack, tensor_table, unpack
from minitron_megatron.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Endings of tensors that old checkpoints carry and every model computes anew."""


class HuggingFaceSource:
    """Tensors of a Hugging Face folder, packed as Megatron's, read one at a time."""

    def __init__(self, folder: Path, arch: Architecture) -> None:
        """Raises CheckpointError for a missing or truncated file and for tensors that the architecture does not have."""
        self.arch = arch
        self._file_of = _files_by_tensor(folder)
        self._open = {path: _open(path) for path in sorted(set(self._file_of.values()))}
        self._offsets = {path: data_offsets(path) for path in self._open}
        self._check_names()

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The widest of its parts', as torch joins them."""
        return reduce(torch.promote_types, (self._part_dtype(name) for name in row.hf_names))

    def read(self, row: TensorRow, rows: range | None = None) -> Tensor:
        """The Megatron tensor of a row, on the CPU, in the checkpoint's own type.

        rows: only these of its first dimension; not of fused QKV rows, which come whole.
        """
        if row.axes[0] == "QKV":
            shapes = hf_shapes(row, self.arch)
            parts = [torch.empty(shape, dtype=self._part_dtype(name)) for name, shape in zip(row.hf_names, shapes, strict=True)]
            for name, part in zip(row.hf_names, parts, strict=True):
                self._fill(part, name, 0)
            return pack(row, parts, self.arch)
        shape = row.shape(self.arch)
        rows = range(shape[0]) if rows is None else rows
        target, first = torch.empty((len(rows), *shape[1:]), dtype=self.dtype(row)), 0
        for name, (length, *_) in zip(row.hf_names, hf_shapes(row, self.arch), strict=True):
            start, stop = max(rows.start, first), min(rows.stop, first + length)
            if start < stop:
                self._fill(target[start - rows.start : stop - rows.start], name, start - first)
            first += length
        return target

    def _fill(self, target: Tensor, name: str, first_row: int) -> None:
        """Reads rows of a tensor of the files into memory of the same or of a wider type."""
        path, dtype = self._file_of[name], self._part_dtype(name)
        offset = self._offsets[path][name] + first_row * prod(target.shape[1:]) * dtype.itemsize
        piece = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype)
        try:
            with path.open("rb", buffering=0) as file:
                read_into(piece, file.fileno(), offset)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error}); copy the model anew") from None
        if piece is not target:
            target.copy_(piece)

    def _part_dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self._slice(name)[:0].dtype
        return found

    def _slice(self, name: str) -> Any:
        return self._open[self._file_of[name]].get_slice(name)

    def _check_names(self) -> None:
        expected = {name: shape for row in tensor_table(self.arch) for name, shape in zip(row.hf_names, hf_shapes(row, self.arch), strict=True)}
        held = {path: set(file.keys()) for path, file in self._open.items()}
        for name, shape in expected.items():
            if name not in self._file_of:
                raise CheckpointError(f"tensor {name} is in none of the safetensors files; is config.json of another model?")
            if name not in held[self._file_of[name]]:
                raise CheckpointError(f"{self._file_of[name]}: tensor {name} is not in it, but {INDEX} says so; copy the model anew")
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self._file_of[name]}: tensor {name} has shape {list(found)}, but config.json means {list(shape)}"
                    + ("; vocab_size is wrong" if name.endswith(("embed_tokens.weight", "lm_head.weight")) else "")
                )
        for name in sorted(set(self._file_of) - set(expected)):
            if not name.endswith(DERIVED) and not self._is_tied_copy(name):
                raise CheckpointError(f"{self._file_of[name]}: tensor {name} is not part of family '{self.arch.family_name}'")

    def _is_tied_copy(self, name: str) -> bool:
        """Whether it is an output weight that some writers save beside tied embeddings; raises where the two differ."""
        if name != "lm_head.weight" or not self.arch.tied_embeddings:
            return False
        copy, embeddings = (self._open[self._file_of[tied]].get_tensor(tied) for tied in (name, "model.embed_tokens.weight"))
        if not torch.equal(copy, embeddings):
            raise CheckpointError(
                f"{self._file_of[name]}: {name} differs from the embeddings, but config.json ties them; set tie_word_embeddings=false"
            )
        return True


def write_huggingface(
    folder: Path,
    source: Any,
    arch: Architecture,
    *,
    shard_bytes: int = 1 << 30,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Streams a Megatron source into safetensors of at most about shard_bytes each; returns the bytes of all tensors.

    The next slabs are read while one is written. on_bytes: told of what has been written. ArtifactError where a file cannot be written.
    """
    slabs = [list(of_row) for _, of_row in groupby(slabs_of(tensor_table(arch), arch, source.dtype), key=lambda slab: slab.row.name)]
    shards = _shards(slabs, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    with closing(read_ahead(chain.from_iterable(slabs), lambda slab: source.read(slab.row, slab.rows))) as stream:
        for file, shard in zip(names, shards, strict=True):
            try:
                _write_shard(folder / file, shard, stream, arch, on_bytes)
            except OSError as error:
                raise unwritable(folder / file, error) from None
    total = sum(slab.nbytes for of_row in slabs for slab in of_row)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for slab in shard for name in slab.row.hf_names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    return total


def _shards(slabs: list[list[Slab]], shard_bytes: int) -> list[list[Slab]]:
    """Slabs of each file: the tensors of a row stay together, and a file holds more than shard_bytes only where one row alone does."""
    shards: list[list[Slab]] = [[]]
    held = 0
    for of_row in slabs:
        size = sum(slab.nbytes for slab in of_row)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1] += of_row
        held += size
    return shards


def _write_shard(path: Path, shard: list[Slab], stream: Iterator[tuple[Slab, Tensor]], arch: Architecture, on_bytes: Callable[[int], None]) -> None:
    parts = {name: (slab.dtype, shape) for slab in shard for name, shape in zip(slab.row.hf_names, hf_shapes(slab.row, arch), strict=True)}
    with SafetensorsFile(path, parts) as file:
        for slab, tensor in islice(stream, len(shard)):
            for name, first_row, piece in _hf_pieces(slab, tensor, arch):
                file.write(name, piece.contiguous(), first_row)
            on_bytes(slab.nbytes)


def _hf_pieces(slab: Slab, tensor: Tensor, arch: Architecture) -> Iterator[tuple[str, int, Tensor]]:
    """Hugging Face name, first row and rows of what a slab holds of each tensor."""
    if slab.is_whole:
        yield from ((name, 0, part) for name, part in zip(slab.row.hf_names, unpack(slab.row, tensor, arch), strict=True))
        return
    first = 0
    for name, (length, *_) in zip(slab.row.hf_names, hf_shapes(slab.row, arch), strict=True):
        start, stop = max(slab.rows.start, first), min(slab.rows.stop, first + length)
        if start < stop:
            yield name, start - first, tensor[start - slab.rows.start : stop - slab.rows.start]
        first += length


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there; model.path must name a Hugging Face folder")
        with _open(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    weight_map = _weight_map(index)
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing; copy the model anew"
        )
    return {name: folder / file for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name."""
    try:
        found = json.loads(index.read_text())
    except ValueError:
        found = None
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no index of safetensors files (JSON with a weight_map); copy it anew")
    return weight_map


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); it may be truncated, copy it anew") from None
