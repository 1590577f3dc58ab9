"""Tensors of a folder, an import of it, and a megatron model filled from an import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import write_torch_dist


@pytest.fixture(scope="session")
def hf_tensors() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor of every safetensors file of a folder."""

    def read(folder: Path) -> dict[str, Tensor]:
        return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    return read


@pytest.fixture(scope="session")
def import_model() -> Callable[[Path, Path], Architecture]:
    """import_model(Hugging Face folder, new checkpoint folder) → its architecture."""

    def write(source: Path, target: Path) -> Architecture:
        arch = source_architecture(str(source))
        reader = HuggingFaceSource(source, arch)
        write_torch_dist(target, tensor_table(arch), arch, dtype=reader.dtype, read=reader.read)
        return arch

    return write


@pytest.fixture
def load_imported(layout: Any) -> Callable[..., Any]:
    """load_imported(checkpoint folder, arch): the megatron model in fp32 on one process."""
    from minitron_megatron.checkpoint.sharded import load_model
    from minitron_megatron.model.build import build_model
    from minitron_megatron.platform import activate

    def load(folder: Path, arch: Architecture) -> Any:
        model = build_model(arch, layout, activate("cpu"), torch.float32)
        load_model(model, folder)
        return model

    return load
