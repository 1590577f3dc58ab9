"""What FP8 cannot do: of a recipe alone, of the sizes of its models, and of the tokens that they see at a time.

Read in the sources of Transformer Engine 2.11 (`assert_dim_for_fp8_exec`, `is_quantizable` and `make_empty` of its tensors,
`cast_master_weights_to_fp8`) and of megatron-core 0.16.1 (TransformerConfig). What the machine cannot do: platform/fp8_support.py.
"""

from __future__ import annotations

from math import lcm

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.checks.teachers import Planned, teacher_architectures
from minitron_megatron.config.fp8 import MULTIPLE, OF_DELAYED, Fp8, Scaling
from minitron_megatron.config.parallel import TeacherParallel
from minitron_megatron.config.schema import Recipe

EMULATE = "fp8.emulated=true rounds the same way without such kernels"
OF_STUDENT = ("weights", "first_last_layers_bf16")


def fp8_problems(recipe: Recipe, source: Architecture, target: Architecture | None, planned: Planned | None = None) -> list[str]:
    """target: None where a search has yet to choose it, or where the recipe's sizes make none."""
    fp8 = recipe.fp8
    if fp8 is None:
        return []
    problems = _section_problems(fp8, recipe) + _weights_problems(fp8, recipe) + _ends_problems(fp8, target)
    if fp8.emulated:
        return problems
    problems += _platform_problems(recipe, fp8) + _token_problems(recipe, fp8)
    if fp8.teacher != "none":
        for arch in dict.fromkeys(teacher_architectures(recipe, source, planned)):
            problems += _teacher_size_problems(recipe, fp8.teacher, arch, "the source model" if arch == source else "a teacher")
    if fp8.student != "none" and recipe.correct:
        problems += size_problems(fp8.student, source, recipe.parallel.tensor, "correct trains the source model", f"fp8.student={fp8.student}")
    if target is not None:
        tensor = recipe.parallel.tensor
        mend = "" if recipe.prune.align.tensor == tensor else f"; set prune.align.tensor={tensor}, which rounds what prune.target names"
        problems += [problem + mend for problem in student_size_problems(recipe, target)]
    return problems


def student_size_problems(recipe: Recipe, target: Architecture, whose: str = "the pruned model") -> list[str]:
    """Of a model that the recipe would train: pruned sizes are multiples by then (checks/align.py), for prune.align.tensor ranks."""
    if recipe.fp8 is None or recipe.fp8.student == "none" or recipe.fp8.emulated:
        return []
    return size_problems(recipe.fp8.student, target, recipe.parallel.tensor, whose, f"fp8.student={recipe.fp8.student}")


def size_problems(scaling: Scaling, arch: Architecture, tensor: int, whose: str, asked_by: str) -> list[str]:
    """Of both sides of every matrix of a layer on a tensor-parallel rank; one line for each that is no multiple."""
    multiple, sizes = MULTIPLE[scaling], _sides(arch)
    split = "" if tensor == 1 else f" on each of {tensor} tensor ranks"
    return [
        f"{asked_by}: {whose} has {name}={size}, and its matrices need multiples of {multiple}{split}; "
        f"nearest: {nearest_multiples(size, multiple * ranks)}"
        for name, size, shared in sizes
        if size % (multiple * (ranks := tensor if shared else 1))
    ]


def _sides(arch: Architecture) -> list[tuple[str, int, bool]]:
    """(name, size, whether tensor ranks share it) of what a layer's matrices have as rows or columns."""
    return [
        ("hidden", arch.hidden, False),
        ("heads × head_channels", arch.heads * arch.head_channels, True),
        ("(heads + 2 × kv_groups) × head_channels", (arch.heads + 2 * arch.kv_groups) * arch.head_channels, True),
        *(("ffn", width, True) for width in sorted(set(arch.ffn_widths))),
    ]


def _teacher_size_problems(recipe: Recipe, scaling: Scaling, arch: Architecture, whose: str) -> list[str]:
    """In its own layout for distill, in the student's for teacher-logits."""
    own = recipe.parallel.teacher
    layouts = {own.tensor} if isinstance(own, TeacherParallel) else {recipe.parallel.tensor}
    layouts |= {recipe.parallel.tensor} if recipe.teacher_logits else set()
    asked_by = f"fp8.teacher={scaling}"
    return [problem for tensor in sorted(layouts) for problem in size_problems(scaling, arch, tensor, whose, asked_by)]


def _section_problems(fp8: Fp8, recipe: Recipe) -> list[str]:
    # a candidate of a search is written out with every field: what counts is what differs from the default
    problems, named = [], {name for name, field in Fp8.model_fields.items() if getattr(fp8, name) != field.default}
    if fp8.teacher == fp8.student == "none":
        return ["fp8: neither fp8.teacher nor fp8.student names a scaling; name one of them, or leave the section out"]
    unread = [f"fp8.{name}" for name in OF_DELAYED if name in named and fp8.student != "delayed"]
    if unread:
        problems.append(f"{', '.join(unread)}: only delayed scaling looks back over steps; leave out, or set fp8.student=delayed")
    ignored = [f"fp8.{name}" for name in OF_STUDENT if getattr(fp8, name) and fp8.student == "none"]
    if ignored:
        problems.append(
            f"{', '.join(ignored)}: of the student, which is not in FP8; name fp8.student, or leave out (a teacher's weights are FP8 anyway)"
        )
    if "nvfp4" in (fp8.teacher, fp8.student) and "format" in named:
        problems.append("fp8.format: nvfp4 has one format, e2m1 with e4m3 scales; leave it out")
    if fp8.emulated and "nvfp4" in (fp8.teacher, fp8.student):
        problems.append("fp8.emulated=true rounds to 8 bits; nvfp4 has 4: choose another scaling, or run it on a Blackwell GPU")
    if fp8.teacher != "none" and recipe.distill.teacher_outputs == "stored" and recipe.teacher_logits is None:
        problems.append("fp8.teacher: no stage of this recipe runs a teacher; leave it out")
    return problems


def _weights_problems(fp8: Fp8, recipe: Recipe) -> list[str]:
    """Of the student's FP8 weights, which are cast from the main copy that the distributed optimizer shares out."""
    if not fp8.weights or fp8.student == "none" or fp8.emulated:
        return []
    problems = []
    if not recipe.training.distributed_optimizer:
        problems.append("fp8.weights=true: megatron casts FP8 weights in its distributed optimizer alone; set training.distributed_optimizer=true")
    if fp8.student in ("delayed", "mxfp8", "nvfp4"):
        why = {
            "delayed": "weights are cast with the scale of earlier steps, and the first steps have none",
            "mxfp8": "its two copies of a weight, along rows and along columns, share no buffer that could be gathered",
            "nvfp4": "Transformer Engine 2.11 casts no main copy to it",
        }
        problems.append(f"fp8.weights=true with fp8.student={fp8.student}: {why[fp8.student]}; set fp8.weights=false")
    return problems


def _ends_problems(fp8: Fp8, target: Architecture | None) -> list[str]:
    if not fp8.first_last_layers_bf16 or fp8.student == "none":
        return []
    if fp8.student == "delayed":
        return [
            "fp8.first_last_layers_bf16=true: with delayed scaling megatron enters FP8 once for all layers, and can leave none out; "
            "set fp8.student=tensorwise, or first_last_layers_bf16=false"
        ]
    if target is not None and target.layers <= 2:
        return [f"fp8.first_last_layers_bf16=true leaves none of {target.layers} layers in FP8; set it to false, or leave fp8.student out"]
    return []


def _platform_problems(recipe: Recipe, fp8: Fp8) -> list[str]:
    problems = []
    if recipe.platform == "cpu":
        problems.append(f"fp8: a CPU multiplies in no FP8; {EMULATE}, or leave the section out")
    for section, precision, scaling in (
        ("precision", recipe.precision, fp8.student),
        ("teacher_precision", recipe.precision_of_teacher, fp8.teacher),
    ):
        if precision == "fp32" and scaling != "none":
            problems.append(
                f"{section}={precision}: what is not FP8 beside it is bf16, which its kernels are made for; set bf16, or fp8.emulated=true"
            )
    return list(dict.fromkeys(problems))


def _token_problems(recipe: Recipe, fp8: Fp8) -> list[str]:
    """Of a single sample: the last micro-batch of a validation may hold no more."""
    parallel, own = recipe.parallel, recipe.parallel.teacher
    student_ranks = parallel.tensor if parallel.sequence else 1
    trained = {section: run.sequence_length for section, run in recipe.training_runs().items()} if fp8.student != "none" else {}
    problems = [
        problem for section, length in trained.items() for problem in _tokens_of(section, length, fp8.student, parallel.context, student_ranks)
    ]
    if fp8.teacher != "none":
        ranks = {(own.tensor if own.sequence else 1) if isinstance(own, TeacherParallel) else student_ranks}
        ranks |= {student_ranks} if recipe.teacher_logits else set()
        for shared in sorted(ranks):
            problems += _tokens_of("distill", recipe.distill.sequence_length, fp8.teacher, parallel.context, shared)
    return list(dict.fromkeys(problems))


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
