"""metrics.jsonl after an interruption."""

from __future__ import annotations

from pathlib import Path

from minitron_megatron.training.metrics import keep_until


def test_steps_behind_the_checkpoint_and_a_torn_last_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
