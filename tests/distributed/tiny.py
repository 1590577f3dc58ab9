"""Tiny models in awkward shapes, written straight to torch_dist checkpoints, tokens, layouts, and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.config.parallel import Parallel, TeacherParallel

VOCAB, SEQUENCE = 131, 16  # 131 rows are uneven on two tensor ranks

# 4 heads in each of 2 groups, head channels that are not hidden / heads, layers that no stage number divides
LLAMA = Architecture("llama", 5, 24, 8, 2, 6, 40, VOCAB, False, 64, 1e-5, 10000.0)
QWEN2_TIED = Architecture("qwen2", 5, 24, 8, 2, 6, 40, VOCAB, True, 64, 1e-6, 1000.0)
# 3 heads in each of 4 groups, for four tensor ranks
WIDE = Architecture("llama", 5, 24, 12, 4, 6, 40, VOCAB, False, 64, 1e-5, 10000.0)
# no two neighbours are alike, each a multiple of two tensor ranks; the widest is not the first
UNEVEN = LLAMA.resized(ffn=[12, 40, 26, 4, 32])
QWEN3 = Architecture("qwen3", 3, 24, 8, 2, 6, 40, VOCAB, False, 64, 1e-6, 1000.0)
# squared ReLU, norms with biases, half of 8 channels turned
NEMOTRON = Architecture("nemotron", 5, 24, 8, 2, 8, 40, VOCAB, False, 64, 1e-5, 10000.0, rotary_share=0.5)
NEMOTRON_TIED = Architecture("nemotron", 3, 24, 8, 2, 8, 40, VOCAB, True, 64, 1e-5, 1000.0, rotary_share=0.25)
# a quarter to a half of the experts a token, router weights that sum to 1 and such that do not, numbers that two ranks divide
MIXTRAL = Architecture("mixtral", 3, 24, 8, 2, 6, 16, VOCAB, False, 64, 1e-5, 10000.0, None, None, 4, 2)
QWEN3_MOE = Architecture("qwen3_moe", 3, 24, 8, 2, 6, 16, VOCAB, True, 64, 1e-6, 1000.0, None, None, 6, 3, normalised_routing=False)

ONE = Parallel()
TP2 = Parallel(tensor=2)
TP2_SP = Parallel(tensor=2, sequence=True)
PP2 = Parallel(pipeline=2)
PP2_EVEN = Parallel(pipeline=2, layers_per_stage="even")
DP2 = Parallel(data=2)
CP2 = Parallel(context=2)
EP2 = Parallel(data=2, expert=2)
EP2_PP2 = Parallel(pipeline=2, data=2, expert=2)
EP2_OF_DP4 = Parallel(data=4, expert=2)
TP2_PP2 = Parallel(tensor=2, pipeline=2, sequence=True)
PP2_VPP2 = Parallel(pipeline=2, virtual=2)
PP4_LISTED = Parallel(pipeline=4, layers_per_stage=[1, 2, 1, 1], teacher=TeacherParallel(pipeline=4, layers_per_stage=[2, 1, 2, 1]))


def with_teacher(student: Parallel, teacher: TeacherParallel | Literal["auto", "student"]) -> Parallel:
    return student.model_copy(update={"teacher": teacher})


def layout_name(parallel: Parallel | TeacherParallel) -> str:
    shorts = {"tp": "tensor", "cp": "context", "pp": "pipeline", "vpp": "virtual", "dp": "data", "ep": "expert"}
    sizes = [f"{short}{getattr(parallel, name)}" for short, name in shorts.items() if getattr(parallel, name, 1) > 1]
    marks = ["sp"] if parallel.sequence else []
    if parallel.layers_per_stage != "cost":
        marks.append("even" if parallel.layers_per_stage == "even" else "listed")
    name = "_".join([*sizes, *marks]) or "one"
    teacher = getattr(parallel, "teacher", "auto")
    return name if teacher == "auto" else f"{name}-teacher_{teacher if isinstance(teacher, str) else layout_name(teacher)}"


def name_of(value: Any) -> str:
    """Name of a test's parameter."""
    return layout_name(value) if isinstance(value, Parallel | TeacherParallel) else str(value)


def teacher_of(student: Architecture) -> Architecture:
    """Wider and deeper than the student in every size that pruning cuts."""
    experts = student.experts + 2 if student.experts else 0
    return student.resized(layers=student.layers + 1, hidden=32, ffn=56, experts=experts)


def write_random(folder: Path, arch: Architecture, seed: int = 0, scale: float = 0.3) -> str:
    """A checkpoint of seeded random fp32 weights, norms around 1; returns its digest."""
    generator = torch.Generator().manual_seed(seed)

    def draw(row: TensorRow) -> Tensor:
        noise = torch.randn(row.shape(arch), generator=generator)
        is_norm = len(row.axes) == 1 and row.axes[0] != "QKV"
        return 1 + 0.2 * noise if is_norm else scale * noise

    return write_torch_dist(folder, tensor_table(arch), arch, dtype=lambda row: torch.float32, read=draw)


def read_all(folder: Path, arch: Architecture) -> dict[str, Tensor]:
    source = MegatronSource(folder, arch)
    return {row.name: source.read(row) for row in tensor_table(arch)}


class RandomSamples:
    """samples × (S + 1) random tokens: a TokenDataset."""

    def __init__(self, samples: int, sequence: int = SEQUENCE, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, (samples, sequence + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, sample_id: int) -> Tensor:
        return self.tokens[sample_id]


def relative_difference(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected magnitude."""
    a, b = torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    if a.shape != b.shape:
        raise AssertionError(f"shapes {list(a.shape)} and {list(b.shape)}")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def worst_difference(actual: dict[Any, Tensor], expected: dict[Any, Tensor]) -> tuple[float, Any]:
    """The largest relative difference of any tensor, and its name; the names must be the same."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"different names: {sorted(map(str, actual.keys() ^ expected.keys()))}")
    return max((relative_difference(actual[name], expected[name]), name) for name in expected)
