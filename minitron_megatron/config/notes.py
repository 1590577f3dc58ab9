"""What a recipe says about numbers, in words."""

from __future__ import annotations

from minitron_megatron.config.schema import Recipe


def precision_notes(recipe: Recipe) -> list[str]:
    """Of models that do not compute in the recipe's precision alone."""
    notes = teacher_notes(recipe) + student_notes(recipe)
    if recipe.fp8:
        notes.append("Embedding, output layer, norms, attention scores, losses and every stage that does not train: no FP8")
    return notes


def teacher_notes(recipe: Recipe) -> list[str]:
    """Of the frozen teacher."""
    notes, fp8 = [], recipe.fp8
    if recipe.teacher_precision != "same":
        all_else = "bf16 where the machine has it, or fp32" if recipe.precision == "auto" else recipe.precision
        notes.append(f"Teacher in {recipe.teacher_precision}, all else in {all_else}")
    if fp8 and fp8.of_teacher:
        notes.append(f"Teacher's layers in {_kind(fp8.emulated)}, {fp8.teacher} scaling, their weights too")
    return notes


def student_notes(recipe: Recipe) -> list[str]:
    """Of the model that a stage trains."""
    fp8, student = recipe.fp8, recipe.fp8.of_student if recipe.fp8 else None
    if fp8 is None or student is None:
        return []
    weights = ", their weights too beside an fp32 main copy" if student.weights and not fp8.emulated else ""
    ends = ", but for the first and the last" if student.first_last_layers_bf16 else ""
    return [f"Layers of what is trained in {_kind(fp8.emulated)}, {fp8.student} scaling{ends}{weights}"]


def _kind(emulated: bool) -> str:
    return "emulated FP8" if emulated else "FP8"
