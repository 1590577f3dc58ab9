"""Models into .nemo archives and out of them: weights streamed, the tokenizer beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from minitron_megatron.arch.nemo_archive import NemoArchive, pack
from minitron_megatron.arch.nemo_config import CONFIG, TOKENIZER_FOLDER, nemo_config_for, tokenizer_members
from minitron_megatron.artifact import require_disk_space
from minitron_megatron.checkpoint.nemo_weights import FOLDER, PICKLE, stacked_place
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.convert.tokenizer_files import copy_tokenizer
from minitron_megatron.convert.widen import WidenedSource
from minitron_megatron.errors import CheckpointError

ARCHIVE = "model.nemo"
SENTENCEPIECE = "tokenizer.model"


def unpack_weights(path: Path, folder: Path) -> None:
    """The archive's weights as files below the folder."""
    archive = NemoArchive(path)
    wanted = archive.below(FOLDER) or [name for name in archive.names if name.split("/")[-1] == PICKLE]
    if not wanted:
        raise CheckpointError(f"{path}: the archive holds neither {FOLDER}/ nor {PICKLE}; is it the archive of a language model?")
    require_disk_space(folder, archive.size(wanted), "the unpacked weights")
    archive.unpack(wanted, folder)


def unpack_tokenizer(path: Path, folder: Path) -> None:
    """The archive's tokenizer under the names that a tokenizer's folder has; raises ArchitectureError where it has none."""
    archive = NemoArchive(path)
    members = tokenizer_members(archive)
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in members.items():
        (folder / target).write_bytes(archive.read(name))


def write_nemo(
    folder: Path,
    source: MegatronSource | WidenedSource,
    config: dict[str, Any],
    tokenizer: Path,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes model.nemo into the folder: model_config.yaml, model_weights/ (torch_dist, NeMo's keys) and the tokenizer.

    config: the model's config.json. Layers have one shape, as a WidenedSource gives them: NeMo keeps those of a kind in one tensor.
    """
    rows, staged = tensor_table(source.arch), folder / "archive"
    shutil.rmtree(staged, ignore_errors=True)  # of a start that was killed
    (staged / FOLDER).mkdir(parents=True)
    write_torch_dist(staged / FOLDER, rows, source.arch, dtype=source.dtype, read=source.read, place=stacked_place, on_bytes=on_bytes)
    dtype = str(source.dtype(rows[0])).removeprefix("torch.")
    fields = nemo_config_for(config, source.arch, _stage_tokenizer(tokenizer, staged), dtype)
    (staged / CONFIG).write_text(yaml.safe_dump(fields, sort_keys=False))
    pack(staged, folder / ARCHIVE)
    shutil.rmtree(staged)


def _stage_tokenizer(tokenizer: Path, staged: Path) -> dict[str, Any]:
    """Copies the tokenizer; returns its section of model_config.yaml."""
    if (tokenizer / SENTENCEPIECE).is_file() and not (tokenizer / "tokenizer.json").is_file():
        shutil.copyfile(tokenizer / SENTENCEPIECE, staged / SENTENCEPIECE)
        return {"library": "sentencepiece", "type": None, "model": f"nemo:{SENTENCEPIECE}", "sentencepiece_legacy": False}
    copy_tokenizer(tokenizer, staged / TOKENIZER_FOLDER)
    # NeMo wants a name or a folder here: whoever loads the archive in NeMo sets it to the unpacked folder
    return {"library": "huggingface", "type": TOKENIZER_FOLDER, "use_fast": True}
