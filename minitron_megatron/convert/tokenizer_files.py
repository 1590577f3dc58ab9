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


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies what is there of the known files; returns their names."""
    target.mkdir(parents=True, exist_ok=True)
    found = [name for name in NAMES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
