"""Artifacts: `runs/NAME/STAGE/` with manifest.json, result.json and the payload, published atomically.

While a stage works, its files lie in `runs/NAME/.STAGE.partial/`; a rename publishes them. An interrupted stage finds its
partial folder again when recipe and inputs are unchanged; a user's mistake leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_megatron.errors import ArtifactError, MinitronError

FORMAT = 2
"""Raised when a stage's files change their meaning: older artifacts are then made anew."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """Hash of everything that shaped this artifact; what later stages hold it by."""
        return str(self.manifest["id"])

    @cached_property
    def result(self) -> dict[str, Any]:
        return json.loads((self.path / "result.json").read_text())


def find_artifact(folder: Path, stage: str) -> Artifact | None:
    """The published artifact of a stage below runs/NAME, or None."""
    manifest = folder / stage / "manifest.json"
    if not manifest.is_file():
        return None
    return Artifact(folder / stage, json.loads(manifest.read_text()))


def open_artifact(folder: Path, stage: str, recipe_path: str = "RECIPE") -> Artifact:
    """The published artifact; raises ArtifactError that names the command that makes it."""
    artifact = find_artifact(folder, stage)
    if artifact is None:
        state = "is unfinished" if partial_folder(folder, stage).exists() else "does not exist"
        raise ArtifactError(f"{folder / stage} {state}; make it with: minitron {stage} {recipe_path}")
    if artifact.manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder / stage} was made by another version of this tool; make it anew with: minitron {stage} {recipe_path}")
    return artifact


def artifact_id(stage: str, settings: dict[str, Any], inputs: dict[str, str], files: Iterable[Path]) -> str:
    """Hash of a stage's settings, of its input artifacts' ids and of the size and time of the outside files it reads."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    text = json.dumps([FORMAT, stage, settings, inputs, stats], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def partial_folder(folder: Path, stage: str) -> Path:
    return folder / f".{stage}.partial"


@contextmanager
def draft(folder: Path, stage: str, identity: str) -> Iterator[Path]:
    """The partial folder of a stage, kept from an interrupted start with the same identity, else empty.

    A MinitronError in the body that keeps no work removes a folder that this call made; anything else leaves it for the next start.
    """
    partial, stamp = partial_folder(folder, stage), partial_folder(folder, stage) / "identity"
    resumed = stamp.is_file() and stamp.read_text() == identity
    if not resumed:
        shutil.rmtree(partial, ignore_errors=True)
        new_parents = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        partial.mkdir(parents=True)
        stamp.write_text(identity)
    try:
        yield partial
    except MinitronError as error:
        if not resumed and not error.keeps_work:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:
                _remove_if_empty(parent)
        raise


def publish(folder: Path, stage: str, manifest: dict[str, Any], result: dict[str, Any]) -> Artifact:
    """Turns the partial folder into the artifact by one rename; an older artifact is set aside until then."""
    partial, final, old = partial_folder(folder, stage), folder / stage, folder / f".{stage}.old"
    write_json(partial / "result.json", result)
    write_json(partial / "manifest.json", {**manifest, "format": FORMAT})
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    (final / "identity").unlink(missing_ok=True)  # until the rename a killed start finds its work by it
    shutil.rmtree(old, ignore_errors=True)
    return Artifact(final, json.loads((final / "manifest.json").read_text()))


def require_disk_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ArtifactError before anything is written when the disk cannot hold what a stage will write."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise ArtifactError(
            f"{folder}: no disk space for {what}: {needed_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "free some, or set runs=FOLDER on another disk"
        )


def write_json(path: Path, value: Any) -> None:
    """Writes through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
    temporary.replace(path)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
