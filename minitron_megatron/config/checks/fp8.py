"""What FP8 cannot do of a recipe.

Read in the sources of Transformer Engine 2.11 (`cast_master_weights_to_fp8`) and of megatron-core 0.16.1 (TransformerConfig). Sizes and tokens:
fp8_sizes.py. What the machine cannot do: platform/fp8_support.py.
"""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.fp8_sizes import fixed_size_problems, student_size_problems, teacher_size_problems, token_problems
from minitron_megatron.config.checks.teachers import Planned, teacher_architectures
from minitron_megatron.config.fp8 import OF_DELAYED, Fp8
from minitron_megatron.config.schema import Recipe

EMULATE = "fp8.emulated=true rounds the same way without such kernels"
OF_STUDENT = ("format", "weights", "first_last_layers_bf16")


def fp8_problems(recipe: Recipe, source: Architecture, target: Architecture | None, planned: Planned | None = None) -> list[str]:
    """target: None where a search has yet to choose it, or where the recipe's sizes make none."""
    fp8 = recipe.fp8
    if fp8 is None:
        return []
    problems = _section_problems(fp8) + _weights_problems(fp8, recipe) + ends_problems(fp8, target)
    if fp8.emulated:
        return problems
    problems += _platform_problems(recipe, fp8) + token_problems(recipe, fp8)
    if fp8.teacher != "none":
        for arch in dict.fromkeys(teacher_architectures(recipe, source, planned)):
            problems += teacher_size_problems(recipe, fp8.teacher, arch, "the source model" if arch == source else "a teacher")
    if fp8.student != "none" and recipe.correct:
        problems += fixed_size_problems("fp8.student", fp8.student, source, recipe.parallel.tensor, "the source model, which correct trains,")
    if target is not None:
        tensor = recipe.parallel.tensor
        mend = "" if recipe.prune.align.tensor == tensor else f"; set prune.align.tensor={tensor}, which rounds what prune.target names"
        problems += [problem + mend for problem in student_size_problems(recipe, target)]
    return problems


def _section_problems(fp8: Fp8) -> list[str]:
    # a candidate of a search is written out with every field: what counts is what differs from the default
    problems, named = [], {name for name, field in Fp8.model_fields.items() if getattr(fp8, name) != field.default}
    if fp8.teacher == fp8.student == "none":
        return ["fp8: neither fp8.teacher nor fp8.student names a scaling; name one of them, or leave the section out"]
    unread = [f"fp8.{name}" for name in OF_DELAYED if name in named and fp8.student != "delayed"]
    if unread:
        problems.append(f"{', '.join(unread)}: only delayed scaling looks back over steps; leave out, or set fp8.student=delayed")
    ignored = [f"fp8.{name}" for name in OF_STUDENT if name in named and fp8.student == "none"]
    if ignored:
        problems.append(
            f"{', '.join(ignored)}: of the student, which is not in FP8; name fp8.student, or leave out (a teacher's weights are FP8 anyway)"
        )
    if fp8.student == "nvfp4" and "format" in named:
        problems.append("fp8.format: nvfp4 has one format, e2m1 with e4m3 scales; leave it out")
    if fp8.emulated and "nvfp4" in (fp8.teacher, fp8.student):
        problems.append("fp8.emulated=true rounds to 8 bits; nvfp4 has 4: choose another scaling, or run it on a Blackwell GPU")
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


def ends_problems(fp8: Fp8, target: Architecture | None) -> list[str]:
    """target: None where it is not known yet."""
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
        mend = "another scaling with fp8.emulated=true rounds the same way" if "nvfp4" in (fp8.teacher, fp8.student) else EMULATE
        problems.append(f"fp8: a CPU multiplies in no FP8; {mend}, or leave the section out")
    of_teacher = "precision" if recipe.teacher_precision == "same" else "teacher_precision"
    asked = ((fp8.student, "precision", recipe.precision), (fp8.teacher, of_teacher, recipe.precision_of_teacher))
    problems += [
        f"{name}=fp32: what is not FP8 beside it is bf16, which its kernels are made for; set bf16, or fp8.emulated=true"
        for scaling, name, precision in asked
        if precision == "fp32" and scaling != "none"
    ]
    return list(dict.fromkeys(problems))
