"""Sizes on disk."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture, parameter_count


def checkpoint_bytes(arch: Architecture, width: int) -> int:
    """Weights alone, as a stage publishes them; file headers and metadata are some MB more."""
    return parameter_count(arch) * width


def training_checkpoint_bytes(arch: Architecture, width: int) -> int:
    """Weights, Adam's two moments and, below fp32, the fp32 main copy (training/job.py, training_bytes)."""
    return parameter_count(arch) * (width + 8 + (4 if width < 4 else 0))
