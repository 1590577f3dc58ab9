"""Stage `import`: a Hugging Face folder, a .nemo archive or a Megatron checkpoint → our torch_dist checkpoint, streamed slab by slab."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.arch.hf_config import architecture_from_hf
from minitron_megatron.arch.nemo_archive import is_nemo
from minitron_megatron.arch.source import source_config
from minitron_megatron.artifact import Artifact, require_disk_space, write_json
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.nemo_weights import open_nemo_weights
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, checkpoint_bytes, checkpoint_folder, write_torch_dist
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.source import Model
from minitron_megatron.convert import hub
from minitron_megatron.convert.nemo_archive import unpack_tokenizer, unpack_weights
from minitron_megatron.convert.tokenizer_files import copy_tokenizer, known_files
from minitron_megatron.errors import DataError
from minitron_megatron.progress import byte_progress

UNPACKED = "unpacked"
SCRATCH = (UNPACKED,)
"""Removed when the stage is published."""


def before(recipe: Recipe) -> None:
    """What the artifact's id is made of has to be there before it is: the files of a model that lies on a hub."""
    hub.fetch(recipe.model)


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes checkpoint/, hf_config.json and tokenizer/ into the folder."""
    if recipe.model.tokenizer and not Path(recipe.model.tokenizer).exists():
        raise DataError(f"model.tokenizer={recipe.model.tokenizer}: no such file or folder; name the one with the tokenizer, or leave it out")
    config = source_config(recipe.model.path, recipe.model.hf_config)
    arch = architecture_from_hf(config)
    archive = Path(recipe.model.path) if is_nemo(recipe.model.path) else None
    source = open_archive(archive, arch, folder / UNPACKED) if archive else open_source(recipe.model, arch)
    rows = tensor_table(arch)
    size = checkpoint_bytes(rows, arch, source.dtype)
    require_disk_space(folder, size, "the imported checkpoint")
    with byte_progress("import", size) as on_bytes:
        digest = write_torch_dist(folder / "checkpoint", rows, arch, dtype=source.dtype, read=source.read, on_bytes=on_bytes)
    write_json(folder / "hf_config.json", config)
    if recipe.model.tokenizer or not archive or recipe.model.hf_config:
        copy_tokenizer(tokenizer_folder(recipe.model), folder / "tokenizer")
    else:
        unpack_tokenizer(archive, folder / "tokenizer")
    return {
        "summary": f"{arch.family_name}, {parameter_count(arch):,} parameters, {size / 1e9:.2f} GB",
        "architecture": arch.to_dict(),
        "parameters": parameter_count(arch),
        "bytes": size,
        "weights_sha256": digest,
        "provenance": {"source": hub.provenance(recipe.model)},
    }


def open_source(model: Model, arch: Architecture) -> HuggingFaceSource | MegatronSource:
    """The reader for the folder that model.path names; its names and shapes are checked against the architecture."""
    folder = Path(model.path)
    if (checkpoint_folder(folder) / ".metadata").is_file():
        return MegatronSource(folder, arch)
    return HuggingFaceSource(folder, arch)


def open_archive(archive: Path, arch: Architecture, unpacked: Path) -> MegatronSource:
    """The same for a .nemo archive, whose weights are written to a folder of their own first."""
    unpack_weights(archive, unpacked)
    return open_nemo_weights(unpacked, arch)


def outside_files(recipe: Recipe) -> list[Path]:
    """Every file of the source model and of a tokenizer beside it, for the artifact's id."""
    model = recipe.model
    folders = [Path(model.path), *([Path(model.hf_config).parent] if _needs_config(model) and model.hf_config else [])]
    archive = [Path(model.path)] if is_nemo(model.path) and Path(model.path).is_file() else []
    tokenizer = known_files(Path(model.tokenizer)) if model.tokenizer else {}
    return [*archive, *tokenizer.values()] + [path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file()]


def tokenizer_folder(model: Model) -> Path:
    if model.tokenizer:
        return Path(model.tokenizer)
    return Path(model.hf_config).parent if _needs_config(model) and model.hf_config else Path(model.path)


def _needs_config(model: Model) -> bool:
    return not (Path(model.path) / "config.json").is_file()
