"""metrics.jsonl after an interruption, and the console line."""

from __future__ import annotations

from pathlib import Path

from minitron_megatron.training.metrics import console_line, keep_until


def test_steps_behind_the_checkpoint_and_a_torn_last_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 0}\n{"step": 1}')  # whole but for its end: the next record would stand on the same line
    keep_until(path, 2)
    assert path.read_text() == '{"step": 0}\n'
    keep_until(path, -1)
    keep_until(path, -1)
    assert path.read_text() == ""


def test_the_console_tells_what_is_trained_on() -> None:
    record = {"step": 1, "steps": 4, "forward_kl": 0.41234, "cross_entropy": 2.314, "jensen_shannon": 0.0912, "mse": 1.5, "gradient_norm": 0.84}
    record |= {"learning_rate": 9.8e-5, "tokens_per_second": 41200.0, "memory_gib": 62.1}
    assert console_line("distill", record, 0.0).startswith("distill 1/4 25% | kl 0.412 | lm 2.31 | js 0.091 | mse 1.500 | |g| 0.84")
    del record["forward_kl"], record["jensen_shannon"], record["mse"]
    assert console_line("correct", record, 0.0).startswith("correct 1/4 25% | lm 2.31 | |g| 0.84")
