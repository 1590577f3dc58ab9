"""Curves of checkpoints: import, export, prune, opening, experts, by bytes, files, layers and tensors."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from growth.curve import Curve, Work
from growth.model import write_random

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource, write_huggingface
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.prune.plan import make_plan
from minitron_megatron.prune.stream import apply_plan
from minitron_megatron.scores.units import random_scores

LAYER = Architecture("llama", 8, 512, 8, 4, 64, 1536, 1024, True, 4096, 1e-5, 10000.0)
"""12 MB a layer in fp32."""
MANY = Architecture("llama", 96, 128, 4, 2, 32, 384, 1024, True, 4096, 1e-5, 10000.0)
"""72 MB in 578 tensors, so that files come out alike."""
THIN = Architecture("llama", 8, 16, 2, 1, 8, 16, 32, True, 64, 1e-5, 10000.0)
SPARSE = Architecture("qwen3_moe", 1, 32, 2, 1, 16, 32, 32, True, 64, 1e-5, 10000.0, experts=8, experts_per_token=2)


class Zeros:
    """A model's tensors without a file."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch

    def dtype(self, row: TensorRow) -> torch.dtype:
        return torch.float32

    def read(self, row: TensorRow, rows: range | None = None) -> torch.Tensor:
        shape = row.shape(self._arch)
        return torch.zeros(len(rows) if rows is not None else shape[0], *shape[1:])


def _folder(path: Path, arch: Architecture, files: int) -> Path:
    path.mkdir()
    write_huggingface(path, Zeros(arch), arch, shard_bytes=_bytes(arch) // files + 1)
    return path


def _bytes(arch: Architecture) -> int:
    return sum(torch.Size(row.shape(arch)).numel() * 4 for row in tensor_table(arch))


def imported(size: int, folder: Path, *, quantity: str) -> Work:
    arch = LAYER.resized(layers=size) if quantity == "layers" else MANY
    place = _folder(folder / "source", arch, size if quantity == "files" else 1)

    def work() -> None:
        shutil.rmtree(folder / "target", ignore_errors=True)
        source = HuggingFaceSource(place, arch)
        write_torch_dist(folder / "target", tensor_table(arch), arch, dtype=source.dtype, read=source.read)

    return work


def exported(size: int, folder: Path, *, quantity: str) -> Work:
    arch = {"layers": LAYER.resized(layers=size), "tensors": THIN.resized(layers=size), "files": MANY}[quantity]
    write_random(folder / "source", arch)
    source = MegatronSource(folder / "source", arch)
    shard_bytes = _bytes(arch) // (size if quantity == "files" else 1) + 1

    def work() -> None:
        shutil.rmtree(folder / "target", ignore_errors=True)
        (folder / "target").mkdir()
        write_huggingface(folder / "target", source, arch, shard_bytes=shard_bytes)

    return work


def pruned(size: int, folder: Path, *, quantity: str) -> Work:
    arch = LAYER.resized(layers=size)
    write_random(folder / "source", arch)
    plan = make_plan(random_scores(arch, 0), arch, arch.resized(hidden=384, ffn=1152, heads=4))

    def work() -> None:
        shutil.rmtree(folder / "target", ignore_errors=True)
        apply_plan(MegatronSource(folder / "source", arch), plan, folder / "target")

    return work


def opened(size: int, folder: Path, *, kind: str) -> Work:
    """Tables, names and shapes checked; no tensor is read."""
    arch = THIN.resized(layers=size)
    if kind == "Hugging Face":
        place = _folder(folder / "source", arch, 1)
        return lambda: HuggingFaceSource(place, arch)
    write_random(folder / "source", arch)
    return lambda: MegatronSource(folder / "source", arch)


def experts(size: int, folder: Path) -> Work:
    """Of one layer, one by one out of the tensor that they share."""
    arch = SPARSE.resized(experts=size)
    write_random(folder / "source", arch)
    rows = tensor_table(arch)

    def work() -> None:
        source = MegatronSource(folder / "source", arch)
        for row in rows:
            source.read(row)

    return work


LAYERS, FILES, TENSORS = (2, 4, 8, 16, 32), (1, 4, 16, 64), (128, 256, 512, 1024)
CURVES = [
    Curve("import", "layers", LAYERS, partial(imported, quantity="layers")),
    Curve("import, equal bytes", "files", FILES, partial(imported, quantity="files")),
    Curve("export", "layers", LAYERS, partial(exported, quantity="layers")),
    Curve("export, equal bytes", "files", FILES, partial(exported, quantity="files")),
    Curve("export of tiny layers", "layers", TENSORS, partial(exported, quantity="tensors")),
    Curve("prune", "layers", LAYERS, partial(pruned, quantity="layers")),
    Curve("open Hugging Face", "layers", TENSORS, partial(opened, kind="Hugging Face")),
    Curve("open torch_dist", "layers", TENSORS, partial(opened, kind="torch_dist")),
    Curve("read all experts", "experts", (64, 128, 256, 512, 1024), experts),
]
