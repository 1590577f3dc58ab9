"""The tokenizer's files travel with the weights, from the source to the exported student."""

from __future__ import annotations

import shutil
from pathlib import Path

NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def known_files(source: Path) -> dict[str, Path]:
    """Name in a tokenizer's folder → file: those of a folder, or a SentencePiece model that is named itself."""
    if source.is_file() and source.suffix == ".model":
        return {"tokenizer.model": source}
    return {name: source / name for name in NAMES if (source / name).is_file()}


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies what is there of the known files; returns their names."""
    target.mkdir(parents=True, exist_ok=True)
    found = known_files(source)
    for name, path in found.items():
        shutil.copyfile(path, target / name)
    return list(found)
