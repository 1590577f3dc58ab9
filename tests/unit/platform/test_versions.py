"""Claims about the supported range of megatron-core and about the differences that versions.py hides."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import versions


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.19.2", "0.16.10"])
def test_supported_releases(version: str) -> None:
    assert versions.is_supported(versions.parse(version))


@pytest.mark.parametrize("version", ["0.16.0", "0.15.3", "0.20.0", "0.20.0rc1", "1.0"])
def test_unsupported_releases(version: str) -> None:
    assert not versions.is_supported(versions.parse(version))


def test_an_unsupported_release_is_refused_in_one_line_with_the_way_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: (0, 14, 0))
    with pytest.raises(PlatformError, match=r"megatron-core 0\.14\.0 is installed, supported is .*; pip install") as caught:
        versions.require_supported()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_a_newer_release_is_refused_by_the_old_one_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metadata.json").write_text("{}")
    monkeypatch.setattr(versions, "installed", lambda: (0, 19, 2))
    versions.require_readable(tmp_path)
    monkeypatch.setattr(versions, "installed", lambda: (0, 16, 1))
    with pytest.raises(PlatformError, match=r"has no common\.pt, so a newer megatron-core wrote it"):
        versions.require_readable(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"")
    versions.require_readable(tmp_path)
