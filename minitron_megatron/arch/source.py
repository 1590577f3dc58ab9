"""The model that a recipe compresses: its config.json, found and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.hf_config import architecture_from_hf
from minitron_megatron.arch.nemo_archive import NemoArchive, is_nemo
from minitron_megatron.arch.nemo_config import config_of_archive
from minitron_megatron.errors import ArchitectureError


def source_config(model_path: str, hf_config: str | None = None) -> dict[str, Any]:
    """config.json of the source model: its folder's own, what its .nemo archive says, or else the one that `model.hf_config` names."""
    if is_nemo(model_path) and not hf_config:
        return config_of_archive(NemoArchive(model_path))
    own = Path(model_path) / "config.json"
    path = Path(hf_config) if hf_config and not own.is_file() else own
    if not path.is_file():
        raise ArchitectureError(
            f"{path}: not found; model.path must name a Hugging Face folder with config.json"
            + ("" if hf_config else ", and a Megatron checkpoint needs model.hf_config=PATH/config.json as well")
        )
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ArchitectureError(f"{path}:{error.lineno}: no valid JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise ArchitectureError(f"{path}: expected a mapping, found {type(config).__name__}")
    return config


def source_architecture(model_path: str, hf_config: str | None = None) -> Architecture:
    return architecture_from_hf(source_config(model_path, hf_config))
