"""The sections teachers, correct and finetune: what they say, what they refuse, and what of them is part of an identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.chain import STAGES, run_id, stage_id, stage_inputs, stage_settings, stages_of
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError

Recipes = Callable[..., Path]
MODEL = Architecture("llama", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0)
CORRECT = {"steps": 200, "sequence_length": 32, "global_batch": 4, "source_peak": 6e-5, "learning_rate": {"minimum": 1e-6}}
FINETUNE = {"steps": 200, "sequence_length": 32, "global_batch": 4}
CHAT = {"train": ["chats/*.jsonl"], "sequence_length": 32}


@pytest.fixture
def teacher(tmp_path: Path) -> Callable[..., str]:
    """teacher(vocab_size=…): a folder with a config.json."""

    def write(**changes: Any) -> str:
        folder = tmp_path / f"teacher_{len(list(tmp_path.glob('teacher_*')))}"
        folder.mkdir()
        sizes = {"num_hidden_layers": 9, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 60}
        config = {
            "model_type": "llama",
            **sizes,
            "vocab_size": 131,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            **changes,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(file, list(overrides)), MODEL)
    return [problem.removeprefix(f"{file}: ") for problem in caught.value.problems]


def test_the_corrections_peak_is_a_fifth_of_the_sources_and_its_warm_up_is_long(recipe_file: Recipes) -> None:
    """P2, section 4."""
    correct = load_recipe(recipe_file(correct=CORRECT)).correct
    assert correct is not None
    assert (correct.learning_rate.peak, correct.learning_rate.warmup_steps) == (pytest.approx(1.2e-5), 120)
    assert Recipe.model_validate(load_recipe(recipe_file(correct=CORRECT)).model_dump()).correct == correct
    both = load_recipe(recipe_file(correct={"steps": 200, "source_peak": 3e-4, "learning_rate": {"peak": 6e-5}})).correct
    assert both is not None and both.learning_rate.peak == pytest.approx(6e-5)  # 3e-4 / 5 is another number in its last bit
    given = load_recipe(recipe_file(correct={"steps": 200, "learning_rate": {"peak": 3e-6}})).correct
    assert given is not None and given.learning_rate.peak == 3e-6


@pytest.mark.parametrize(
    ("correct", "told"),
    [
        ({"steps": 200}, "correct: give correct.source_peak, the peak learning rate of the source's own training, or correct.learning_rate.peak"),
        (
            {"steps": 200, "source_peak": 1e-4, "learning_rate": {"peak": 1e-4}},
            "correct: correct.source_peak=0.0001 asks for learning_rate.peak=2e-05, which is given as 0.0001; leave one of them out",
        ),
        ({"steps": 200, "source_peak": True}, "correct.source_peak: input should not be true or false (found True)"),
        ({"steps": 200, "source_peak": 1e-4, "beside": 3}, "correct.beside: input should be a valid boolean, unable to interpret input (found 3)"),
    ],
)
def test_a_correction_without_a_rate_or_with_two_is_refused(recipe_file: Recipes, correct: dict[str, Any], told: str) -> None:
    assert told in problems(recipe_file(correct=correct))


def test_every_training_stage_is_checked_as_the_distillation_is(recipe_file: Recipes) -> None:
    file = recipe_file(correct={**CORRECT, "steps": 100, "sequence_length": 256}, finetune={**FINETUNE, "global_batch": 3}, chat=CHAT)
    assert problems(file, "parallel.data=2") == [
        "correct.sequence_length=256 is beyond the model's 128 positions; at most 128",
        "correct.learning_rate.warmup_steps=120 must be less than correct.steps=100",
        "finetune.global_batch=3 is not divisible by micro_batch × parallel.data = 2; nearest: 2, 4",
    ]


def test_sections_that_need_another_one_say_so(recipe_file: Recipes, teacher: Callable[..., str]) -> None:
    found = problems(
        recipe_file(correct=CORRECT, finetune=FINETUNE, teachers={"models": [{"path": teacher()}]}, distill={"hidden": {"pairs": "kept"}})
    )
    assert found == [
        "finetune: trains on conversations, which no section names; add the section chat, with chat.train",
        "correct: corrects the source, which is none of teachers.models; add {path: source} there, or leave correct out",
        "distill.hidden.pairs=kept goes by the layers that were cut out of the source, but the first of teachers.models is another",
    ]


def test_a_teacher_that_does_not_fit_is_refused_with_what_is_wrong(recipe_file: Recipes, teacher: Callable[..., str]) -> None:
    other, short, wide = teacher(vocab_size=99), teacher(max_position_embeddings=16), teacher(num_key_value_heads=3)
    models = [{"path": "source"}, {"path": other}, {"path": short}, {"path": wide}, {"path": "nowhere"}]
    assert problems(recipe_file(teachers={"models": models}), "parallel.tensor=2") == [
        f"teachers.models: {other} has a vocabulary of 99, not the source's of 131; name one that shares it",
        f"distill.sequence_length=32 is beyond the 16 positions of the teacher {short}; at most 16",
        f"parallel.tensor=2 does not divide the teacher {wide}'s 3 key/value groups (a group belongs to one rank); tensor sizes that do: 1, 3",
        "teachers.models: nowhere/config.json: not found; teachers.models.path must name a Hugging Face folder with config.json, "
        "and a Megatron checkpoint needs teachers.models.hf_config=PATH/config.json as well",
    ]


def test_unknown_keys_within_a_list_get_the_nearest_known_one(recipe_file: Recipes) -> None:
    [problem] = problems(recipe_file(teachers={"models": [{"path": "source", "wieght": 2}]}))
    assert problem == "teachers.models.0.wieght: unknown key 'wieght'; did you mean 'weight'?"


def names(recipe: Recipe) -> list[str]:
    return [stage.name for stage in stages_of(recipe)]


def test_a_chain_has_the_stages_that_its_recipe_asks_for(recipe_file: Recipes) -> None:
    plain = load_recipe(recipe_file())
    assert names(plain) == ["import", "data", "importance", "prune", "distill", "evaluate", "export", "report"]
    asked = load_recipe(recipe_file(correct=CORRECT, chat=CHAT, finetune=FINETUNE, teachers={"models": [{"path": "source"}]}))
    assert names(asked)[4:8] == ["teachers", "correct", "prune", "distill"] and names(asked)[8:] == ["finetune", "evaluate", "export", "report"]
    beside = load_recipe(recipe_file(correct={**CORRECT, "beside": True}))
    assert names(beside) == names(plain)
    for stage in ("distill", "evaluate", "report"):
        assert "correct" in stage_inputs(STAGES[stage], asked) and "correct" not in stage_inputs(STAGES[stage], beside)


def test_settings_of_recipes_without_the_sections_are_what_they_were(recipe_file: Recipes) -> None:
    """Artifacts that were made before the sections existed are still found."""
    recipe = load_recipe(recipe_file())
    assert stage_settings(STAGES["distill"], recipe).keys() == {"distill"}
    assert stage_inputs(STAGES["distill"], recipe) == ("import", "data", "prune")
    assert stage_inputs(STAGES["evaluate"], recipe) == ("import", "data", "prune", "distill")
    assert stage_inputs(STAGES["export"], recipe) == ("import", "prune", "distill")


def test_a_teachers_weight_is_the_distillations_business_and_its_path_the_imports(recipe_file: Recipes) -> None:
    light, heavy, other = (
        load_recipe(recipe_file(teachers={"models": [{"path": "source"}, model]}))
        for model in ({"path": "a", "weight": 1}, {"path": "a", "weight": 2}, {"path": "b", "weight": 1})
    )
    teachers, distill = STAGES["teachers"], STAGES["distill"]
    assert stage_settings(teachers, light) == stage_settings(teachers, heavy) != stage_settings(teachers, other)
    assert stage_settings(distill, light) == stage_settings(distill, other) != stage_settings(distill, heavy)


def test_a_distillation_beside_a_correction_is_the_same_run_however_far_that_is(recipe_file: Recipes) -> None:
    stage = STAGES["distill"]
    plain = load_recipe(recipe_file())
    beside, longer, slower = (
        load_recipe(recipe_file(correct={**CORRECT, "beside": True, **change})) for change in ({}, {"steps": 300, "save_every_steps": 5}, {"seed": 3})
    )
    assert stage_id(stage, beside, {}) == stage_id(stage, longer, {})
    assert len({run_id(stage, recipe, {}) for recipe in (plain, beside, slower)}) == 3
    before = load_recipe(recipe_file(correct=CORRECT))
    assert stage_id(STAGES["correct"], beside, {}) == stage_id(STAGES["correct"], before, {})
