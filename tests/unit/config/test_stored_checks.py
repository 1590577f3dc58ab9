"""What a distillation from stored outputs cannot do is refused in one line each, with its mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.teacher_logits import TeacherLogits
from minitron_megatron.errors import RecipeError

MODEL = Architecture("llama", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0)
STORED = ["distill.teacher_outputs=stored", "teacher_logits.k=8"]


def test_a_recipe_that_reads_what_it_stores_is_taken(recipe_file: Callable[..., Path]) -> None:
    check_recipe(load_recipe(recipe_file(), [*STORED, "distill.loss={forward_kl: 1, cross_entropy: 0.1}"]), MODEL)
    check_recipe(load_recipe(recipe_file(), [*STORED, "distill.temperature=2", "teacher_logits.temperature=2", "teacher_logits.kind=sample"]), MODEL)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["distill.teacher_outputs=stored"], "distill.teacher_outputs=stored: no section says what is stored; add the section teacher_logits"),
        (["teacher_logits.k=131"], "teacher_logits.k=131 leaves no tail of the source model's 131 tokens"),
        (["teacher_logits={}", "teachers.models=[{path: source}, {path: source}]"], "teacher_logits stores one teacher, and teachers.models names 2"),
        (
            ["teacher_logits={}", "correct={source_peak: 1e-3, steps: 9, beside: true}"],
            "teacher_logits: with correct.beside=true the teacher changes",
        ),
        ([*STORED, "distill.loss=cross_entropy"], "distill.teacher_outputs=stored: distill.loss has no forward_kl"),
        (
            [*STORED, "distill.loss={forward_kl: 1, reverse_kl: 1, mse: 1}"],
            "distill.teacher_outputs=stored: reverse_kl, mse needs every token's logit",
        ),
        ([*STORED, "distill.hidden={}"], "distill.teacher_outputs=stored: hidden states are not stored"),
        ([*STORED, "distill.top_k=4"], "distill.teacher_outputs=stored: distill.top_k is of a live teacher"),
        ([*STORED, "distill.temperature=2"], "distill.temperature=2.0 is not that of the stored outputs, teacher_logits.temperature=1.0; set both"),
        (
            [*STORED, "search={space: {ffn: [16]}, parameters: 1000000}"],
            "distill.teacher_outputs=stored: the candidates of a search learn from a live",
        ),
    ],
)
def test_each_problem_with_its_mend(recipe_file: Callable[..., Path], overrides: list[str], start: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(recipe_file(), overrides), MODEL)
    assert any(line.startswith(start) for line in caught.value.problems), caught.value.problems


def test_what_shapes_what_is_stored() -> None:
    """How many samples, and how they are computed, does not: what is there of a sample serves every run. Nor do settings of the other kind."""
    top_k, sample = TeacherLogits(), TeacherLogits(kind="sample")
    assert top_k.shaping().keys() == {"kind", "k", "log_probs", "temperature", "block_samples"}
    assert sample.shaping().keys() == {"kind", "draws", "seed", "temperature", "block_samples"}
    assert TeacherLogits(samples=9, micro_batch=3, chunk_tokens=5).shaping() == top_k.shaping()
    # the artifacts that are read say which teacher it was: a distillation made before this field was known keeps its identity
    assert Distill(steps=1, teacher_outputs="stored").shaping() == Distill(steps=1).shaping()
