"""A model named by its hub id is fetched once, at its revision, whole or not at all; the hub is a folder here."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from minitron_megatron.config.source import Hub, Model
from minitron_megatron.convert import hub
from minitron_megatron.errors import DataError

REVISION, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the hub was asked for."""
    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> None:
        asked.append({"repository": repository, **options})
        folder = Path(options["local_dir"])
        (folder / ".cache").mkdir(parents=True)
        (folder / ".cache" / "lock").touch()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def model(tmp_path: Path, revision: str = REVISION) -> Model:
    return Model(path=str(tmp_path / "models" / "tiny"), hub=Hub(repository="owner/tiny", revision=revision))


def test_it_is_fetched_once_at_its_revision_with_the_checksum_of_every_file(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    for _ in range(2):
        hub.fetch(model(tmp_path))
    assert [(call["repository"], call["revision"]) for call in calls] == [("owner/tiny", REVISION)]
    found = hub.provenance(model(tmp_path))
    assert found == {"repository": "owner/tiny", "revision": REVISION, "sha256": {"config.json": hashlib.sha256(b"{}").hexdigest()}}
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["tiny"]


def test_a_folder_that_is_there_is_the_model_and_no_hub_is_asked(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    Path(model(tmp_path).path).mkdir(parents=True)
    hub.fetch(model(tmp_path))
    hub.fetch(Model(path=str(tmp_path / "not there")))
    assert calls == [] and hub.provenance(model(tmp_path)) is None


def test_another_revision_is_not_taken_for_the_one_that_is_named(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    hub.fetch(model(tmp_path))
    with pytest.raises(DataError, match=f"holds owner/tiny at {REVISION}, and model.hub names owner/tiny at {OTHER}"):
        hub.fetch(model(tmp_path, OTHER))


def test_without_a_network_the_command_for_another_machine_is_named_and_nothing_looks_like_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, **options: Any) -> None:
        Path(options["local_dir"]).mkdir(parents=True)
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError, match=f"hf download owner/tiny --revision {REVISION} --local-dir"):
        hub.fetch(model(tmp_path))
    assert not Path(model(tmp_path).path).exists()
    shutil.rmtree(tmp_path / "models")


@pytest.mark.parametrize("revision", ["main", "v1.0", "a" * 39])
def test_a_revision_that_may_move_is_refused(revision: str) -> None:
    with pytest.raises(ValueError, match="revision"):
        Hub(repository="owner/tiny", revision=revision)
