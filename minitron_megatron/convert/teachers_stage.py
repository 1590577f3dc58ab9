"""Stage `teachers`: the models that teach beside the source or in its place → torch_dist checkpoints, one folder each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.artifact import Artifact, require_disk_space
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import checkpoint_bytes, write_torch_dist
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.source import Model
from minitron_megatron.config.teachers import TeacherModel
from minitron_megatron.convert.import_stage import open_source, tokenizer_folder
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.progress import byte_progress

SAMPLE_TEXT = "Distil 12 % of 1,536 neurons — naïve? 東京, Москва: def f(x): return x**2\n"


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes N/checkpoint/ for each model of the list but the source. Raises DataError for one with another tokenizer."""
    found = [_import(model, folder / str(number), inputs["import"]) for number, model in enumerate(imported_models(recipe))]
    told = ", ".join(f"{entry['path']} ({entry['parameters']:,} parameters)" for entry in found)
    return {"summary": told or "the source alone", "models": found}


def outside_files(recipe: Recipe) -> list[Path]:
    """Every file of every teacher, for the artifact's id."""
    folders = {folder for model in imported_models(recipe) for folder in (Path(model.path), tokenizer_folder(_named(model)))}
    return [path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file()]


def imported_models(recipe: Recipe) -> list[TeacherModel]:
    """Those of the list that are not the source."""
    if recipe.teachers is None:
        raise RecipeError("teachers: no such section; add it")
    return [model for model in recipe.teachers.models if not model.is_source]


def _import(model: TeacherModel, folder: Path, original: Artifact) -> dict[str, Any]:
    arch, named = source_architecture(model.path, model.hf_config), _named(model)
    _refuse_other_tokenizer(tokenizer_folder(named), original)
    source, rows = open_source(named, arch), tensor_table(arch)
    size = checkpoint_bytes(rows, arch, source.dtype)
    require_disk_space(folder, size, "the imported teacher")
    with byte_progress("teachers", size) as on_bytes:
        digest = write_torch_dist(folder / "checkpoint", rows, arch, dtype=source.dtype, read=source.read, on_bytes=on_bytes)
    sizes = {"architecture": arch.to_dict(), "parameters": parameter_count(arch)}
    return {"path": model.path, "folder": folder.name, **sizes, "weights_sha256": digest}


def _named(model: TeacherModel) -> Model:
    return Model(path=model.path, hf_config=model.hf_config, tokenizer=model.tokenizer)


def _refuse_other_tokenizer(folder: Path, original: Artifact) -> None:
    """The same number of entries is not yet the same vocabulary."""
    vocab = Architecture.from_dict(original.result["architecture"]).vocab
    try:
        own, theirs = load_tokenizer(original.path / "tokenizer"), load_tokenizer(folder)
    except DataError:  # models without tokenizers have to be believed
        return
    if own.encode(SAMPLE_TEXT) != theirs.encode(SAMPLE_TEXT):
        raise DataError(
            f"{folder}: this teacher's tokenizer gives other ids than the source's, although both have {vocab}; "
            "name a teacher with the source's tokenizer in teachers.models"
        )
