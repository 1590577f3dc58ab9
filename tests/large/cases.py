"""Published models on layouts of tens to a thousand ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.hf_config import architecture_from_hf
from minitron_megatron.config.distill import Training
from minitron_megatron.config.parallel import Parallel, TeacherParallel

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "architectures"


def published(name: str) -> Architecture:
    return architecture_from_hf(json.loads((CONFIGS / f"{name}.json").read_text()))


LLAMA_8B, NEMOTRON_15B = published("llama31_8b"), published("nemotron4_15b")
LLAMA_70B = LLAMA_8B.resized(layers=80, hidden=8192, heads=64, ffn=28672)
# as small Llamas are: one matrix for embedding and output; three tokens more than four or eight tensor ranks divide
LLAMA_TIED = replace(LLAMA_8B, vocab=128_259, tied_embeddings=True)

OVERLAPPED = Training(overlap_grad_reduce=True, overlap_param_gather=True)


@dataclass(frozen=True)
class Case:
    """A distillation: who teaches, who learns, on which ranks."""

    source: Architecture
    target: Architecture
    parallel: Parallel
    training: Training = OVERLAPPED
    micro_batches: int = 9
    sequence: int = 16


def own(tensor: int, pipeline: int, *, sequence: bool = True) -> TeacherParallel:
    return TeacherParallel(tensor=tensor, pipeline=pipeline, sequence=sequence)


SMALL = {
    # the width recipe's sizes; teacher and student differ in their pipelines
    "llama_8b_to_4b on 64": Case(
        LLAMA_8B,
        LLAMA_8B.resized(hidden=3072, ffn=9216),
        Parallel(tensor=8, pipeline=4, data=2, sequence=True, teacher=own(8, 8)),
    ),
    # 26 layers on eight virtual stages, tied and padded embeddings, data-parallel ranks that are no power of two, a teacher on more tensor ranks
    "llama_tied_to_26_layers on 48": Case(
        LLAMA_TIED,
        LLAMA_TIED.resized(layers=26),
        Parallel(tensor=4, pipeline=4, virtual=2, data=3, sequence=True, teacher=own(8, 3)),
    ),
    # nothing sharded along the sequence, one data-parallel rank, whose optimizer shares nothing out
    "nemotron_15b_to_8b on 16": Case(
        NEMOTRON_15B,
        NEMOTRON_15B.resized(hidden=4096, ffn=16384),
        Parallel(tensor=8, pipeline=2, teacher=own(2, 4, sequence=False)),
    ),
}
LARGE = {
    "llama_8b_to_16_layers on 1024": Case(
        LLAMA_8B,
        LLAMA_8B.resized(layers=16),
        Parallel(tensor=8, pipeline=4, data=32, sequence=True, teacher=own(4, 8)),
        micro_batches=41,
    ),
    "nemotron_15b_to_8b on 1024": Case(
        NEMOTRON_15B,
        NEMOTRON_15B.resized(hidden=4096, ffn=16384),
        Parallel(tensor=8, pipeline=8, data=16, sequence=True, teacher=own(8, 16)),
        micro_batches=23,
    ),
    "llama_70b_to_53_layers on 1024": Case(
        LLAMA_70B,
        LLAMA_70B.resized(layers=53, ffn=21504),
        Parallel(tensor=8, pipeline=16, data=8, sequence=True, teacher="student"),
        micro_batches=11,
    ),
}
