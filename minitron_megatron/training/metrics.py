"""What a training step tells: one console line, the same fields in metrics.jsonl, TensorBoard and, when asked for, W&B."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from minitron_megatron.config.distill import Wandb
from minitron_megatron.training.losses.settings import OF_STORED

WINDOWS = "validation.jsonl"
NOT_PLOTTED = ("step", "steps", "validation", "seconds", "teacher")
SHORT = {
    "forward_kl_top_k": "top-k kl",
    "forward_kl_sampled": "sampled kl",
    "reverse_kl": "reverse kl",
    "jensen_shannon": "js",
    "mse": "mse",
    "cosine": "cosine",
}
"""Losses that are on the console where they are trained on; KL and cross-entropy always are."""


class MetricsLog:
    """Writes below a folder; on the main process only."""

    def __init__(self, folder: Path, *, finished_steps: int, wandb: Wandb | None, run_name: str) -> None:
        self._path, self._windows = folder / "metrics.jsonl", folder / WINDOWS
        for path in (self._path, self._windows):
            keep_until(path, finished_steps or -1)  # a run from the start logs step 0 anew
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=finished_steps + 1)
        self._wandb = _start_wandb(wandb, run_name, folder) if wandb else None

    def write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        values = {f"train/{name}": value for name, value in record.items() if name not in NOT_PLOTTED}
        values |= {f"validation/{name}": value for name, value in record.get("validation", {}).items()}
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb:
            self._wandb.log(values, step=record["step"])

    def write_windows(self, record: dict[str, Any]) -> None:
        """Losses of each held-out window at a step: what standard errors and paired differences between models are made of."""
        with self._windows.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def keep_until(path: Path, step: int) -> None:
    """Drops what an interrupted run logged after its last checkpoint: those steps come again. They are the last lines, and only these are read."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = len(text)
        while end and _step_of(text[(start := text.rfind(b"\n", 0, end - 1) + 1) : end]) > step:
            end = start
    os.truncate(path, end)


def _step_of(line: bytes) -> float:
    """Of a line that was not written to its end (a full disk, a killed run): never."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except json.JSONDecodeError:
        return float("inf")


def console_line(stage: str, record: dict[str, Any], remaining_seconds: float) -> str:
    """`distill 120/2000 6% | kl 0.412 | lm 2.31 | |g| 0.84 | lr 9.8e-5 | 41.2k tok/s | 62.1 GiB | eta 3h12m`"""
    step, steps = record["step"], record["steps"]
    fields = [
        f"{stage} {step}/{steps} {100 * step // steps}%",
        *([f"kl {record['forward_kl']:.3f}"] if "forward_kl" in record else []),
        f"lm {record['cross_entropy']:.2f}",
        *(f"{short} {record[name]:.3f}" for name, short in SHORT.items() if name in record),
        *([f"hidden {record['hidden']:.3f}"] if "hidden" in record else []),
        f"|g| {record['gradient_norm']:.2f}",
        f"lr {record['learning_rate']:.1e}",
        f"{_short(record['tokens_per_second'])} tok/s",
        f"{record['memory_gib']:.1f} GiB",
        f"eta {_duration(remaining_seconds)}",
    ]
    return " | ".join(fields)


def validation_line(step: int, values: dict[str, float]) -> str:
    kl = f"kl {values['forward_kl']:.3f} | " if "forward_kl" in values else ""
    kl = kl or "".join(f"{SHORT[name]} {values[name]:.3f} | " for name in OF_STORED.values() if name in values)
    return f"validation at step {step} | {kl}perplexity {values['perplexity']:.2f}"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _start_wandb(settings: Wandb, run_name: str, folder: Path) -> Any:
    import wandb

    return wandb.init(project=settings.project, mode=settings.mode, name=run_name, dir=str(folder))
