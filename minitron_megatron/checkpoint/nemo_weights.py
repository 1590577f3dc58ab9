"""Weights of an unpacked .nemo archive: a torch_dist or zarr folder, or one pickle of tensors. No code of theirs is run."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.save_stream import Place
from minitron_megatron.checkpoint.tensors import TensorRow
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.errors import CheckpointError

FOLDER, PICKLE = "model_weights", "model_weights.ckpt"
PREFIX = "model."
"""Of every name in a NeMo checkpoint; with its half-precision wrapper `model.module.`."""
LEGACY = (
    # names before Megatron-Core (mcore_gpt: false), as NeMo's own converters write both
    (r"^language_model\.embedding\.", "embedding."),
    (r"^language_model\.output_layer\.", "output_layer."),
    (r"^language_model\.encoder\.", "decoder."),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.post_attention_layernorm\.", ".pre_mlp_layernorm."),
)
ZARR_TYPES = {"bfloat16": torch.bfloat16, "<f4": torch.float32, "<f2": torch.float16, "<f8": torch.float64}


def open_nemo_weights(folder: Path, arch: Architecture) -> MegatronSource:
    """The weights of an unpacked archive; raises CheckpointError for none, for shards of several ranks, and for what is no tensor."""
    if (folder / FOLDER / ".metadata").is_file():
        return MegatronSource(folder / FOLDER, arch)
    if (folder / FOLDER).is_dir():
        return MegatronSource(folder / FOLDER, arch, ZarrReader(folder / FOLDER))
    if (folder / PICKLE).is_file():
        return MegatronSource(folder, arch, PickleReader(folder / PICKLE))
    sharded = next(folder.glob(f"*/{PICKLE}"), None)
    if sharded:
        raise CheckpointError(
            f"{sharded.parent.name}/{PICKLE}: the archive's weights are cut for several ranks; "
            "merge them in NeMo (tensor_model_parallel_size=1, pipeline_model_parallel_size=1)"
        )
    raise CheckpointError(f"the archive holds neither {FOLDER}/ nor {PICKLE}; is it the archive of a language model?")


def stacked_place(row: TensorRow, arch: Architecture) -> Place:
    """Where NeMo's own checkpoints have a tensor of the table: all layers of a kind in one, [L, …]."""
    if row.layer is None:
        return PREFIX + row.key, row.prefix(arch)
    return PREFIX + row.key.replace(f".layers.{row.layer}.", ".layers."), ((row.layer, arch.layers), *row.prefix(arch))


class PickleReader:
    """Tensors of model_weights.ckpt under Megatron-Core's names, mapped from the file as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        self._held = {_core_name(name): value for name, value in _tensors_of(path).items()}
        self.tensors: Mapping[str, TensorStorageMetadata] = {name: _entry(tuple(value.shape), value.dtype) for name, value in self._held.items()}

    def read(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None) -> Tensor:
        """The whole tensor of a key, or the region that starts at offsets and has these sizes."""
        tensor = self._held[key]
        for dim, (start, length) in enumerate(zip(offsets or (), sizes or (), strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor.clone(memory_format=torch.contiguous_format)


class ZarrReader:
    """Regions of a folder of zarr arrays as megatron-core wrote them until 2024: format 2, chunks that are not compressed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays = {path.parent.name: _array_of(path) for path in sorted(folder.glob("*/.zarray"))}
        self.tensors: Mapping[str, TensorStorageMetadata] = {
            name: _entry(tuple(array["shape"]), ZARR_TYPES[array["dtype"]]) for name, array in self._arrays.items()
        }

    def read(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None) -> Tensor:
        """The whole tensor of a key, or the region that starts at offsets and has these sizes."""
        array = self._arrays[key]
        shape, chunk = array["shape"], array["chunks"]
        starts, lengths = offsets or (0,) * len(shape), sizes or tuple(shape)
        target = torch.empty(lengths, dtype=ZARR_TYPES[array["dtype"]])
        touched = [range(start // size, -(-(start + length) // size)) for start, length, size in zip(starts, lengths, chunk, strict=True)]
        for place in itertools.product(*touched):
            piece, goal = self._chunk(key, array, place), target
            for dim, (number, size, start, length) in enumerate(zip(place, chunk, starts, lengths, strict=True)):
                first, last = max(number * size, start), min((number + 1) * size, start + length)
                piece, goal = piece.narrow(dim, first - number * size, last - first), goal.narrow(dim, first - start, last - first)
            goal.copy_(piece)
        return target

    def _chunk(self, key: str, array: dict[str, Any], place: tuple[int, ...]) -> Tensor:
        path = self.folder / key / array.get("dimension_separator", ".").join(map(str, place))
        dtype, count = ZARR_TYPES[array["dtype"]], math.prod(array["chunks"])
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise CheckpointError(f"{path.name} of tensor {key} is missing or cut short in {FOLDER}/; copy the archive anew")
        return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(array["chunks"])


def _tensors_of(path: Path) -> Mapping[str, Tensor]:
    """A pickle's tensors; torch's reader refuses everything that is not one (Transformer Engine's states are bytes)."""
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything
        told = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path.name}: cannot be read as plain tensors ({told}); pickled code is never run, save it anew in NeMo") from None
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    named = loaded.items() if isinstance(loaded, dict) else ()
    return {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor) and not name.endswith("_extra_state")}


def _core_name(name: str) -> str:
    """Megatron-Core's name, without NeMo's wrappers."""
    name = name.removeprefix(PREFIX).removeprefix("module.")
    for pattern, replacement in LEGACY:
        name = re.sub(pattern, replacement, name)
    return name


def _array_of(path: Path) -> dict[str, Any]:
    try:
        array: dict[str, Any] = json.loads(path.read_text())
        plain = array["zarr_format"] == 2 and array["order"] == "C" and array["compressor"] is None and not array.get("filters")
        whole = len(array["shape"]) == len(array["chunks"]) and all(type(size) is int and size > 0 for size in array["shape"] + array["chunks"])
        # a separator is a part of every chunk's path
        known = plain and whole and array["dtype"] in ZARR_TYPES and array.get("dimension_separator", ".") in (".", "/")
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise CheckpointError(
            f"{FOLDER}/{path.parent.name}: not an uncompressed zarr array of format 2; convert it in NeMo (dist_ckpt_format=torch_dist)"
        )
    return array


def _entry(shape: tuple[int, ...], dtype: torch.dtype) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
