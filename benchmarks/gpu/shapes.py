"""What benchmarks/gpu measures: the shapes of Llama-3.1-8B and of its two 4B students, and the precisions; small ones for --tiny."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.hf_config import architecture_from_hf
from minitron_megatron.config.fp8 import Fp8, ModelFp8

ROOT = Path(__file__).resolve().parents[2]


class Shapes(NamedTuple):
    teacher: Architecture
    width: Architecture
    depth: Architecture


def shapes(*, tiny: bool) -> Shapes:
    """configs/llama31_8b_to_4b_width.yaml and _depth.yaml; tiny: multiples of 128, which every scaling takes."""
    if tiny:
        teacher = Architecture("llama", 4, 256, 4, 2, 64, 512, 512, False, 512, 1e-5, 10000.0)
        return Shapes(teacher, teacher.resized(hidden=128, ffn=256), teacher.resized(layers=2))
    teacher = architecture_from_hf(json.loads((ROOT / "configs/architectures/llama31_8b.json").read_text()))
    return Shapes(teacher, teacher.resized(hidden=3072, ffn=9216), teacher.resized(layers=16))


@dataclass(frozen=True)
class Precision:
    """How both models of a distillation compute; None: in bf16 alone."""

    name: str
    teacher: ModelFp8 | None = None
    student: ModelFp8 | None = None


BF16 = "bf16"
FP8 = {
    "tensorwise": Fp8(teacher="tensorwise", student="tensorwise"),
    "tensorwise, FP8 weights": Fp8(teacher="tensorwise", student="tensorwise", weights=True),
    "delayed": Fp8(teacher="tensorwise", student="delayed"),
    "blockwise": Fp8(teacher="blockwise", student="blockwise"),
}
"""A frozen teacher has no delayed scaling: under no_grad it would never learn its scales (config/fp8.py)."""
PRECISIONS = (BF16, *FP8)


def precision(name: str, *, emulated: bool) -> Precision:
    """emulated: rounded as FP8 rounds, on a CPU."""
    if name == BF16:
        return Precision(BF16)
    section = FP8[name].model_copy(update={"emulated": emulated})
    return Precision(name, section.of_teacher, section.of_student)
