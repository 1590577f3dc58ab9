"""A family in one file: what each step prunes and learns from, and mistakes in any step told before the first one runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minitron_megatron import conductor
from minitron_megatron.cli import app
from minitron_megatron.config.family import checked_steps, load_recipe, load_steps, picked_steps
from minitron_megatron.errors import RecipeError

Recipes = Callable[..., Path]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 128,
}


def family_of(recipe_file: Recipes, *steps: dict[str, Any], **sections: Any) -> Path:
    return recipe_file(family=list(steps), **sections)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "original")


def test_each_step_prunes_the_model_that_the_one_before_exported(recipe_file: Recipes) -> None:
    steps = load_steps(family_of(recipe_file, {"name": "large"}, {"name": "middle", "prune": {"target": {"ffn": 12}}}, {"name": "small"}))
    assert [(step.recipe.runs, step.recipe.name) for step in steps] == [("runs/tiny", "large"), ("runs/tiny", "middle"), ("runs/tiny", "small")]
    assert [step.recipe.model.path for step in steps] == ["somewhere", "runs/tiny/large/export/model", "runs/tiny/middle/export/model"]
    assert [step.recipe.prune.target.ffn for step in steps] == [16, 12, 16]  # a step's own keys are its own
    assert [step.recipe.importance.samples for step in steps] == [4, 4, 4]


def test_a_step_may_go_back_to_the_original_or_go_on_from_the_untrained_model(recipe_file: Recipes) -> None:
    steps = load_steps(family_of(recipe_file, {"name": "a"}, {"name": "b", "source": "pruned"}, {"name": "c", "source": "original"}))
    assert steps[1].recipe.model.path == "runs/tiny/a/prune/checkpoint"
    assert steps[1].recipe.model.hf_config == "runs/tiny/a/prune/hf_config.json"
    assert steps[1].recipe.model.tokenizer == "runs/tiny/a/import/tokenizer"
    assert steps[2].recipe.model.path == "somewhere"
    assert [step.trained for step in steps] == [False, True, True]  # nobody reads a trained model of step a


def test_overrides_stand_above_every_step_and_one_of_them_picks_a_step(recipe_file: Recipes) -> None:
    file = family_of(recipe_file, {"name": "a"}, {"name": "b", "distill": {"steps": 7}})
    assert [step.recipe.distill.steps for step in picked_steps(file)] == [100, 7]
    assert [step.recipe.distill.steps for step in picked_steps(file, ["distill.steps=3"])] == [3, 3]
    assert load_recipe(file, ["step=b"]).distill.steps == 7
    assert picked_steps(file, ["step=b"])[0].overrides == ["step=b"]


def test_a_later_step_is_checked_against_the_model_that_does_not_exist_yet(recipe_file: Recipes, model: str) -> None:
    """middle leaves 8 FFN neurons; small asks for more than that, and is refused before anything runs."""
    wrong = {"name": "small", "prune": {"target": {"ffn": 9}}}
    steps = load_steps(family_of(recipe_file, {"name": "middle", "prune": {"target": {"ffn": 8}}}, wrong, model={"path": model}))
    with pytest.raises(RecipeError) as caught:
        checked_steps(steps)
    assert caught.value.problems == ["step small: prune.target.ffn=9 is larger than the source's 8"]


def test_architectures_of_a_family_follow_from_each_other(recipe_file: Recipes, model: str) -> None:
    steps = load_steps(
        family_of(
            recipe_file,
            {"name": "middle", "prune": {"target": {"ffn": 48}}},
            {"name": "small", "prune": {"target": {"ffn": 48, "layers": 6}}},
            {"name": "other", "source": "original", "prune": {"target": {"ffn": 80}}},
            model={"path": model},
        )
    )
    found = [(source.ffn, target.ffn, target.layers) for _, source, target in checked_steps(steps)]
    assert found == [(96, 48, 8), (48, 48, 6), (96, 80, 8)]


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ([], "family: a list of steps is expected, each with a name"),
        ([{"prune": {}}], "family: a list of steps is expected, each with a name"),
        ([{"name": "a"}, {"name": "a"}], "family: two steps are called a; give each its own name"),
        ([{"name": "a"}, {"name": "b", "source": "first"}], "family: step b: source=first; known: previous, pruned, original"),
        ([{"name": "a"}, {"name": "b", "teacher": "best"}], "family: step b: teacher=best; known: source, previous, original"),
        ([{"name": "a", "source": "previous"}], "family: step a: source=previous, but no step is before it; leave it out"),
        (
            [{"name": "a"}, {"name": "b", "teacher": "original", "teachers": {"models": [{"path": "x"}]}}],
            "family: step b: teacher=original and teachers both say who teaches; leave one of them out",
        ),
        ([{"name": "${nothing}"}], "Interpolation key 'nothing' not found"),
        ([{"name": "a", "precision": "${nothing}"}], "Interpolation key 'nothing' not found"),
    ],
)
def test_a_malformed_family_is_refused(recipe_file: Recipes, family: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_steps(recipe_file(family=family))
    assert told in str(caught.value)


def test_a_step_has_to_be_named_where_one_recipe_is_wanted(recipe_file: Recipes) -> None:
    file = family_of(recipe_file, {"name": "a"}, {"name": "b"})
    for overrides, told in (([], "is a family of a, b; name one with step=NAME"), (["step=c"], "unknown step 'c'; the family's steps: a, b")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(file, overrides)
        assert told in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(), ["step=a"])
    assert "the recipe has no family" in str(caught.value)


def test_a_problem_names_its_step(recipe_file: Recipes) -> None:
    with pytest.raises(RecipeError) as caught:
        load_steps(family_of(recipe_file, {"name": "a"}, {"name": "b", "distill": {"stepz": 3}}))
    assert "step b: distill.stepz: unknown key 'stepz'; did you mean 'steps'?" in str(caught.value)


def test_a_teacher_that_is_not_the_source_is_imported_beside_it(recipe_file: Recipes) -> None:
    """A teacher assistant is the same form: the small model comes from the original and learns from the middle one."""
    assistant = {"name": "small", "source": "original", "teacher": "previous"}
    last = {"name": "last", "teacher": "original"}
    steps = load_steps(family_of(recipe_file, {"name": "middle"}, assistant, last))
    teachers = [step.recipe.teachers for step in steps]
    assert teachers[0] is None
    assert [teacher.models[0].path for teacher in teachers[1:] if teacher] == ["runs/tiny/middle/export/model", "somewhere"]
    assert load_steps(family_of(recipe_file, {"name": "a"}, {"name": "b", "teacher": "previous"}))[1].recipe.teachers is None  # it is the source


def test_a_step_that_learns_from_the_one_before_is_checked_ahead_of_it_and_has_it_trained(recipe_file: Recipes, model: str) -> None:
    """Nothing is there yet: the teacher's architecture is the one that the step before is to make."""
    middle, small = {"name": "middle", "prune": {"target": {"ffn": 48, "layers": 6}}}, {"name": "small", "teacher": "previous"}
    for source in ("original", "pruned"):
        steps = load_steps(family_of(recipe_file, middle, {**small, "source": source}, model={"path": model}))
        assert [step.name for step, _, _ in checked_steps(steps)] == ["middle", "small"]
        assert [step.trained for step in steps] == [True, True]
    wrong = {**small, "source": "original", "distill": {"hidden": {"pairs": [[6, 1]]}}}
    with pytest.raises(RecipeError) as caught:
        checked_steps(load_steps(family_of(recipe_file, middle, wrong, model={"path": model})))
    assert caught.value.problems == ["step small: distill.hidden.pairs: [6, 1] names layer 6 of the source model, which has layers 0 to 5"]


def test_a_step_reads_what_the_one_before_exports(recipe_file: Recipes, model: str) -> None:
    """In the form that its own keys ask for, with all FFNs as wide as the widest."""
    first = {"name": "a", "export": {"format": "nemo"}, "prune": {"target": {"ffn": [48, 40, 48, 40, 48, 40, 48, 32]}}}
    second = {"name": "b", "prune": {"target": {"ffn": None, "hidden": 32}}}
    steps = load_steps(family_of(recipe_file, first, second, {"name": "c"}, model={"path": model}))
    assert [step.recipe.model.path for step in steps[1:]] == ["runs/tiny/a/export/model.nemo", "runs/tiny/b/export/model"]
    assert [(source.ffn, source.ffn_per_layer) for _, source, _ in checked_steps(steps)[1:]] == [(48, None), (48, None)]
    pruned = load_steps(family_of(recipe_file, first, {**second, "source": "pruned"}, model={"path": model}))
    assert checked_steps(pruned)[1][1].ffn_per_layer == (48, 40, 48, 40, 48, 40, 48, 32)


def test_a_steps_losses_replace_the_files(recipe_file: Recipes) -> None:
    own = {"name": "b", "distill": {"loss": {"reverse_kl": 0.5}}}
    steps = load_steps(family_of(recipe_file, {"name": "a"}, own, distill={"loss": {"forward_kl": 1.0}}))
    assert [step.recipe.distill.loss for step in steps] == [{"forward_kl": 1.0}, {"reverse_kl": 0.5}]


def test_interpolations_follow_overrides_beside_a_family_of_the_command_line(recipe_file: Recipes) -> None:
    file = recipe_file(parallel={"tensor": 1}, prune={"align": {"tensor": "${parallel.tensor}"}})
    [step] = load_steps(file, ["family=[{name: a}]", "parallel.tensor=2"])
    assert step.recipe.prune.align.tensor == 2


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"export": "nemo"}, "step a: export is a section, not 'nemo'; its keys: format"),
        ({"runs": 5}, "step a: runs: input should be a valid string (found 5)"),
        ({"name": None}, "name is missing; folder below `runs` that the steps' folders are in"),
    ],
)
def test_what_the_steps_share_is_told_like_any_recipes_mistake(recipe_file: Recipes, sections: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_steps(family_of(recipe_file, {"name": "a"}, {"name": "b"}, **sections))
    assert told in str(caught.value)


def test_a_step_that_is_only_pruned_may_be_run_alone(recipe_file: Recipes, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no evaluation to show."""
    started: list[list[str]] = []
    monkeypatch.setattr(conductor, "run_stages", lambda names, *_: started.append(list(names)) or 0)
    file = family_of(recipe_file, {"name": "a"}, {"name": "b", "source": "pruned"}, model={"path": model})
    ran = CliRunner().invoke(app, ["run", str(file), "step=a"])
    assert (ran.exit_code, started) == (0, [["import", "data", "importance", "prune"]])
    assert "Pruned: runs/tiny/a/prune" in ran.output


SEARCH = {"space": {"ffn": [16, 24, 32]}, "memory": {"gib": 1}}


def test_a_step_behind_a_search_is_checked_when_its_source_is_there(recipe_file: Recipes, model: str) -> None:
    large = {"name": "large", "prune": {"target": {"ffn": None}}, "search": SEARCH}
    file = family_of(recipe_file, large, {"name": "small", "prune": {"target": {"ffn": 999}}}, model={"path": model})
    assert [step.name for step, _, _ in checked_steps(picked_steps(file))] == ["large"]
    steps = picked_steps(file, ["step=small"])
    exported = Path(steps[0].recipe.model.path)
    with pytest.raises(RecipeError, match="not found"):
        checked_steps(steps)
    own = file.parent / exported
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps(CONFIG))
    steps = picked_steps(file, ["step=small", f"runs={file.parent / 'runs'}"])
    with pytest.raises(RecipeError, match=r"prune\.target\.ffn=999 is larger than the source's 96"):
        checked_steps(steps)


def test_advice_tells_the_steps_that_it_cannot_look_at_yet(recipe_file: Recipes, model: str) -> None:
    large = {"name": "large", "prune": {"target": {"ffn": None}}, "search": SEARCH}
    ran = CliRunner().invoke(app, ["advise", str(family_of(recipe_file, large, {"name": "small"}, model={"path": model}))])
    assert ran.exit_code == 0 and "step large: " in ran.output
    assert ran.output.splitlines()[-1].startswith("step small: goes on from what a search finds")


def test_steps_from_the_original_are_checked_beside_a_search_too(recipe_file: Recipes, model: str) -> None:
    large = {"name": "large", "prune": {"target": {"ffn": None}}, "search": SEARCH}
    file = family_of(recipe_file, large, {"name": "small", "source": "original", "prune": {"target": {"ffn": 999}}}, model={"path": model})
    with pytest.raises(RecipeError, match=r"step small: prune\.target\.ffn=999"):
        checked_steps(picked_steps(file))
