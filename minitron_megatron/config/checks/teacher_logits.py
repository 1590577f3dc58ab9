"""What stored outputs of a teacher can stand for, and what needs the teacher itself."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.schema import Recipe


def stored_problems(recipe: Recipe, source: Architecture) -> list[str]:
    """Of the section teacher_logits and of a distillation that reads what it stored."""
    reads = recipe.distill.teacher_outputs == "stored"
    if recipe.teacher_logits is None:
        return ["distill.teacher_outputs=stored: no section says what is stored; add the section teacher_logits, or set live"] if reads else []
    return _teacher_problems(recipe, source) + (_distillation_problems(recipe) if reads else [])


def _teacher_problems(recipe: Recipe, source: Architecture) -> list[str]:
    """Of what is stored: one distribution over the vocabulary for each token."""
    problems, section = [], recipe.teacher_logits
    if section and section.kind == "top_k" and section.k >= source.vocab:
        problems.append(f"teacher_logits.k={section.k} leaves no tail of the source model's {source.vocab} tokens; give less")
    if recipe.teachers and len(recipe.teachers.models) > 1:
        problems.append(f"teacher_logits stores one teacher, and teachers.models names {len(recipe.teachers.models)}; name one, or leave it out")
    if recipe.correct_beside:
        problems.append("teacher_logits: with correct.beside=true the teacher changes while it teaches; set it to false, or leave teacher_logits out")
    return problems


def _distillation_problems(recipe: Recipe) -> list[str]:
    """Of what reads them: no hidden states are stored, no single token outside the classes, no other temperature."""
    distill, section, problems = recipe.distill, recipe.teacher_logits, []
    others = [name for name in distill.loss if name not in ("forward_kl", "cross_entropy")]
    how = "distill.teacher_outputs=stored"
    if not distill.loss.get("forward_kl"):
        problems.append(f"{how}: distill.loss has no forward_kl, which alone reads them; add it, or set distill.teacher_outputs=live")
    if others:
        problems.append(f"{how}: {', '.join(others)} needs every token's logit; leave it out of distill.loss, or set distill.teacher_outputs=live")
    if distill.hidden:
        problems.append(f"{how}: hidden states are not stored; leave distill.hidden out, or set distill.teacher_outputs=live")
    if distill.top_k:
        problems.append(f"{how}: distill.top_k is of a live teacher, what is stored has teacher_logits.k classes; leave distill.top_k out")
    if recipe.search:
        problems.append(f"{how}: the candidates of a search learn from a live teacher; set distill.teacher_outputs=live, or leave search out")
    if section and distill.temperature != section.temperature:
        problems.append(
            f"distill.temperature={distill.temperature} is not that of the stored outputs, teacher_logits.temperature={section.temperature}; "
            "set both to the same"
        )
    return problems
