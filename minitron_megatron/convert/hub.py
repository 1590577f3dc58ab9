"""A source model that a recipe names by its hub id: fetched once, at a pinned revision, into model.path, with the checksum of every file.

No other stage asks a hub for anything, and with files under model.path this one does not either.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from minitron_megatron.artifact import write_json
from minitron_megatron.config.source import Hub, Model
from minitron_megatron.errors import DataError

RECORD = "hub.json"
"""In the folder: where its files came from, and their sha256."""

WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt")
"""Weights in another format would double what is fetched."""

BLOCK_BYTES = 1 << 24


def fetch(model: Model) -> None:
    """Nothing where model.path is there. Raises DataError where it holds another revision, or the hub does not give it."""
    if model.hub is None:
        return
    folder, known = Path(model.path), provenance(model)
    if known and (known["repository"], known["revision"]) != (model.hub.repository, model.hub.revision):
        raise DataError(
            f"{folder}: holds {known['repository']} at {known['revision']}, and model.hub names {model.hub.repository} at {model.hub.revision}; "
            "set model.path to another folder, or remove this one"
        )
    if not folder.exists():
        _fetch(model.hub, folder)


def provenance(model: Model) -> dict[str, Any] | None:
    """Repository, revision and the files' sha256, of a folder that was fetched."""
    record = Path(model.path) / RECORD
    return json.loads(record.read_text()) if record.is_file() else None


def _fetch(hub: Hub, folder: Path) -> None:
    """Through a folder beside it: one that was interrupted is no model."""
    partial = folder.with_name(f".{folder.name}.partial")
    print(f"import: fetching {hub.repository} at {hub.revision} into {folder}", flush=True)
    _download(hub, partial, folder)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    files = {path.relative_to(partial).as_posix(): sha256_of(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    write_json(partial / RECORD, {"repository": hub.repository, "revision": hub.revision, "sha256": files})
    partial.rename(folder)


def _download(hub: Hub, partial: Path, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        # what an interrupted start fetched is not fetched again; the token is the user's own, from HF_TOKEN or his login
        snapshot_download(hub.repository, revision=hub.revision, local_dir=partial, allow_patterns=list(WANTED))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of them, a missing network among them
        by_hand = f"hf download {hub.repository} --revision {hub.revision} --local-dir {folder}"
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"model.hub: {hub.repository} at {hub.revision} could not be fetched: {reason}; where there is a network: {by_hand}"
        ) from None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
