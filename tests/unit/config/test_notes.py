"""What a recipe and the first lines of its stages say about FP8 and precisions."""

from __future__ import annotations

import pytest
from shape_8b import WIDTH, Recipes

from minitron_megatron.chain import STAGES
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.notes import precision_notes
from minitron_megatron.worker import numbers

TEACHER = "Teacher's layers in FP8, blockwise scaling, their weights too"
STUDENT = "Layers of what is trained in FP8, tensorwise scaling, but for the first and the last, their weights too beside an fp32 main copy"
BOTH = ["fp8.teacher=blockwise", "fp8.student=tensorwise", "fp8.weights=true", "fp8.first_last_layers_bf16=true"]


def test_nothing_is_said_where_everything_is_in_the_recipes_precision(recipe_file: Recipes) -> None:
    assert precision_notes(load_recipe(recipe_file(**WIDTH), [])) == []


def test_both_models_are_named_and_what_no_fp8_is(recipe_file: Recipes) -> None:
    notes = precision_notes(load_recipe(recipe_file(**WIDTH), BOTH))
    assert notes[:2] == [TEACHER, STUDENT] and "every stage that does not train: no FP8" in notes[2]


def test_an_emulation_has_no_weights_in_fp8(recipe_file: Recipes) -> None:
    assert precision_notes(load_recipe(recipe_file(**WIDTH), [*BOTH, "fp8.emulated=true"]))[1] == (
        "Layers of what is trained in emulated FP8, tensorwise scaling, but for the first and the last"
    )


def test_a_teachers_own_precision_is_told_beside_one_that_is_not_settled(recipe_file: Recipes) -> None:
    [note] = precision_notes(load_recipe(recipe_file(**WIDTH), ["precision=auto", "teacher_precision=fp32"]))
    assert note == "Teacher in fp32, all else in bf16 where the machine has it, or fp32"


@pytest.mark.parametrize(
    ("stage", "said"),
    [("importance", []), ("correct", [STUDENT]), ("teacher-logits", [TEACHER]), ("distill", [TEACHER, STUDENT]), ("evaluate", [])],
)
def test_a_stages_first_lines_are_about_the_models_that_it_runs(recipe_file: Recipes, stage: str, said: list[str]) -> None:
    assert numbers(STAGES[stage], load_recipe(recipe_file(**WIDTH), BOTH)) == said
