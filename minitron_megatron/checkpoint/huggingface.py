"""Hugging Face checkpoints: streaming safetensors, one file or sharded with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
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
        self._check_names()

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The widest of its parts', as torch joins them."""
        return reduce(torch.promote_types, (self._slice(name)[:0].dtype for name in row.hf_names))

    def read(self, row: TensorRow) -> Tensor:
        """The Megatron tensor of a row, on the CPU, in the checkpoint's own type."""
        parts = [self._open[self._file_of[name]].get_tensor(name) for name in row.hf_names]
        return pack(row, parts, self.arch)

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


def write_huggingface(folder: Path, source: Any, arch: Architecture, *, shard_bytes: int = 1 << 30) -> int:
    """Streams a Megatron source into safetensors of at most about shard_bytes each; returns the bytes of all tensors."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(source, arch, shard_bytes):
        save_file(shard, folder / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    for number in range(len(shards)):
        (folder / f"shard-{number}.tmp").chmod(0o644)  # save_file makes it readable to its owner alone
    if len(shards) == 1:
        (folder / "shard-0.tmp").rename(folder / SINGLE)
        return total
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.tmp").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    return total


def _shards(source: Any, arch: Architecture, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for row in tensor_table(arch):
        tensors = [part.contiguous() for part in unpack(row, source.read(row), arch)]
        size = sum(tensor.nbytes for tensor in tensors)
        if shard and held + size > shard_bytes:
            yield shard
            shard, held = {}, 0
        held += size
        # a clone where parts share storage: safetensors refuses tensors that do
        shard.update(zip(row.hf_names, (part.clone() if len(tensors) > 1 else part for part in tensors), strict=True))
    yield shard


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
