"""Sizes of models, and tokens that they see at a time, that FP8 kernels cannot multiply.

Read in Transformer Engine 2.11: `assert_dim_for_fp8_exec`, `is_quantizable` and `make_empty` of its tensors. An emulation asks for none of it.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.fp8 import MULTIPLE, Fp8, Scaling
from minitron_megatron.config.parallel import TeacherParallel
from minitron_megatron.config.schema import Recipe

LEAST = "tensorwise, which needs multiples of 16"


def student_size_problems(recipe: Recipe, target: Architecture, whose: str = "the pruned model") -> list[str]:
    """Of a model that the recipe would train: pruned sizes are multiples by then (checks/align.py), for prune.align.tensor ranks."""
    if recipe.fp8 is None or recipe.fp8.student == "none" or recipe.fp8.emulated:
        return []
    scaling, tensor = recipe.fp8.student, recipe.parallel.tensor
    coarse = "" if MULTIPLE[scaling] == 16 else f"; or set fp8.student to {LEAST}"
    return [
        f"fp8.student={scaling}: {whose} has {_needed(name, size, scaling, tensor)}; nearest: {nearest_multiples(size, multiple)}{coarse}"
        for name, size, multiple in _no_multiples(scaling, target, tensor)
    ]


def fixed_size_problems(setting: str, scaling: Scaling, arch: Architecture, tensor: int, whose: str) -> list[str]:
    """Of a model whose sizes are what they are."""
    instead = "none" if MULTIPLE[scaling] == 16 else f"{LEAST}, or to none"
    mend = f"set {setting} to {instead}" + (", or parallel.tensor to less" if tensor > 1 else "")
    return [
        f"{setting}={scaling}: {whose} has {_needed(name, size, scaling, tensor)}; {mend}" for name, size, _ in _no_multiples(scaling, arch, tensor)
    ]


def teacher_size_problems(recipe: Recipe, scaling: Scaling, arch: Architecture, whose: str) -> list[str]:
    tensors = dict.fromkeys(layout.tensor for layout in _teacher_layouts(recipe))
    return [problem for tensor in tensors for problem in fixed_size_problems("fp8.teacher", scaling, arch, tensor, whose)]


def token_problems(recipe: Recipe, fp8: Fp8) -> list[str]:
    """Of a single sample: the last micro-batch of a validation may hold no more."""
    parallel = recipe.parallel
    student_ranks = parallel.tensor if parallel.sequence else 1
    trained = {section: run.sequence_length for section, run in recipe.training_runs().items()} if fp8.student != "none" else {}
    problems = [
        problem for section, length in trained.items() for problem in _tokens_of(section, length, fp8.student, parallel.context, student_ranks)
    ]
    if fp8.teacher != "none":
        for context, _, shared in _teacher_layouts(recipe):
            problems += _tokens_of("distill", recipe.distill.sequence_length, fp8.teacher, context, shared)
    return list(dict.fromkeys(problems))


class _TeacherLayout(NamedTuple):
    """What sizes and tokens depend on."""

    context: int
    tensor: int
    sequence_ranks: int


def _teacher_layouts(recipe: Recipe) -> list[_TeacherLayout]:
    """Its own beside a student in distill; the student's in teacher-logits, where context ranks share samples out, not sequences."""
    parallel, own = recipe.parallel, recipe.parallel.teacher
    alone = _TeacherLayout(1, parallel.tensor, parallel.tensor if parallel.sequence else 1)
    found = [alone] if recipe.teacher_logits else []
    if recipe.distill.teacher_outputs == "live":
        live = _TeacherLayout(1, own.tensor, own.tensor if own.sequence else 1) if isinstance(own, TeacherParallel) else alone
        found.append(live._replace(context=parallel.context))
    return found


def _needed(name: str, size: int, scaling: Scaling, tensor: int) -> str:
    split = "" if tensor == 1 else f" on each of {tensor} tensor ranks"
    return f"{name}={size}, and its matrices need multiples of {MULTIPLE[scaling]}{split}"


def _no_multiples(scaling: Scaling, arch: Architecture, tensor: int) -> list[tuple[str, int, int]]:
    """(name, size, what it should be a multiple of) of both sides of every matrix of a layer."""
    asked = [(name, size, MULTIPLE[scaling] * (tensor if shared else 1)) for name, size, shared in _sides(arch)]
    return [(name, size, multiple) for name, size, multiple in asked if size % multiple]


def _sides(arch: Architecture) -> list[tuple[str, int, bool]]:
    """(name, size, whether tensor ranks share it) of what a layer's matrices have as rows or columns."""
    return [
        ("hidden", arch.hidden, False),
        ("heads × head_channels", arch.heads * arch.head_channels, True),
        ("(heads + 2 × kv_groups) × head_channels", (arch.heads + 2 * arch.kv_groups) * arch.head_channels, True),
        *(("ffn", width, True) for width in sorted(set(arch.ffn_widths))),
    ]


def _tokens_of(section: str, length: int, scaling: str, context: int, sequence_ranks: int) -> list[str]:
    """Backward multiplies along the tokens of a rank; under sequence parallelism each rank first makes FP8 of its part."""
    multiple = context * (32 if scaling in ("mxfp8", "nvfp4") else 16)
    if sequence_ranks > 1:
        multiple = lcm(multiple, context * sequence_ranks * {"blockwise": 128, "mxfp8": 32, "nvfp4": 32}.get(scaling, 8))
    if length % multiple == 0:
        return []
    layout = "".join(
        [f" under parallel.context={context}" * (context > 1), f" under sequence parallelism of {sequence_ranks}" * (sequence_ranks > 1)]
    )
    return [
        f"{section}.sequence_length={length}: FP8 {scaling} multiplies along the tokens of a rank, and needs a multiple of {multiple}{layout}; "
        f"nearest: {nearest_multiples(length, multiple)}"
    ]
