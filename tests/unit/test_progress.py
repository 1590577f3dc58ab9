"""What a stage shows of its bytes where no terminal is."""

from __future__ import annotations

import pytest

from minitron_megatron import progress
from minitron_megatron.progress import byte_progress


def test_lines_say_bytes_speed_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with byte_progress("import", 40_000_000_000) as on_bytes:
        for seconds in (1, 9, 19, 6, 1):  # 10 s have to go by before there is a line again
            now[0] += seconds
            on_bytes(900_000_000 * seconds)
    assert capsys.readouterr().out.splitlines() == ["import 9.0/40.0 GB · 0.90 GB/s · 0:34", "import 26.1/40.0 GB · 0.90 GB/s · 0:15"]


def test_other_processes_show_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_BYTES", 0.0)
    with byte_progress("prune", 10, is_main=False) as on_bytes:
        on_bytes(10)
    assert capsys.readouterr().out == ""
