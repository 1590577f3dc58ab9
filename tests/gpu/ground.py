"""Where claims are measured, and how much of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .setting import Run, Setting


@dataclass(frozen=True)
class Ground:
    """Where claims are measured, and how much: a GPU and all of it, or a CPU and little, for the plumbing."""

    folder: Path
    """Of the bench: runs and houses lie below it."""
    device: str = "cuda"
    house_name: str = "small"
    samples: int = 8
    length: int = 64
    steps: int = 200
    window: int = 50
    resumed_steps: int = 20
    training: tuple[str, ...] = ("distill.global_batch=16", "distill.micro_batch=8", "distill.sequence_length=32", "distill.save_every_steps=1000")
    scalings: tuple[str, ...] = ("delayed", "tensorwise", "blockwise")
    teachers: tuple[str, ...] = ("tensorwise", "blockwise")
    teacher_kl: float = 0.05
    """Nats a token."""
    big: str = "llama31_8b"
    layers: int | None = None
    loss_size: tuple[int, int, int] = (512, 512, 8192)
    """Tokens, hidden, vocabulary."""
    loss_peak_size: tuple[int, int, int] = (8192, 4096, 128_256)
    loss_peak_mib: int = 512
    """Of chunks of logits."""

    @property
    def house(self) -> Run:
        return Run.of("house", Setting(self.device), name=self.house_name)  # type: ignore[arg-type]

    @property
    def house_folder(self) -> str:
        return str(self.folder / self.house.name)

    def setting(self, **changes: object) -> Setting:
        spec = "te" if self.device == "cuda" else "local"
        return replace(Setting(self.device, spec), **changes)  # type: ignore[arg-type]

    def outputs(self, setting: Setting, **given: object) -> Run:
        return Run.of("outputs", setting, house=self.house_folder, samples=self.samples, length=self.length, **given)

    def distilled(self, setting: Setting, steps: int, **given: object) -> Run:
        return Run.of("distill", setting, house=self.house_folder, steps=steps, overrides=list(self.training), **given)

    def scores(self, setting: Setting) -> Run:
        return Run.of("scores", setting, house=self.house_folder, samples=self.samples, length=self.length)
