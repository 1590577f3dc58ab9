"""Recipes as they are read: every problem in one error, each with its key and its mend; overrides are typed as YAML is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import RecipeError

Recipes = Callable[..., Path]


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, list(overrides))
    assert all("\n" not in problem for problem in caught.value.problems)  # one line each
    return caught.value.problems


def test_every_problem_is_reported_at_once_in_one_line_each(recipe_file: Recipes) -> None:
    file = recipe_file(
        distil={"lr": 1},
        importance={"samples": 0},
        prune={"target": {"fnn": 8}},
        distill={"steps": None, "temperature": "warm"},
        data={"train": []},
    )
    found = problems(file)
    for expected in (
        "distil: unknown section 'distil'; did you mean 'distill'?",
        "prune.target.fnn: unknown key 'fnn'; did you mean 'ffn'?",
        "importance.samples: input should be greater than or equal to 1 (found 0)",
        "distill.steps: input should be a valid integer",
        "distill.temperature: input should be a valid number",
        "data.train: list should have at least 1 item",
    ):
        assert sum(expected in problem for problem in found) == 1, f"{expected} not once in {found}"
    assert len(found) == 6
    assert all(problem.startswith(f"{file}: ") for problem in found)


def test_missing_keys_are_named_with_what_they_are(recipe_file: Recipes) -> None:
    found = problems(recipe_file(model=None, data=None, prune=None, distill={"steps": 5}, name=None))
    assert sorted(problem.split(": ")[1].split(" ")[0] for problem in found) == ["data", "model", "name", "prune"]
    (steps,) = problems(recipe_file(distill=None), "distill.sequence_length=32")
    assert "distill.steps is missing" in steps
    (path,) = problems(recipe_file(model=None), "model.hf_config=x")
    (end,) = problems(recipe_file(), "distill.loss={mse: {from: 1}}")
    assert "distill.loss.mse.to is missing; weight after the schedule's steps" in end
    assert "model.path is missing; folder with config.json, safetensors and tokenizer" in path


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("distill.steps=many", "distill.steps"),
        ("distill.steps=1.5", "distill.steps"),
        ("distill.steps=true", "distill.steps"),
        ("distill.learning_rate.peak=0", "distill.learning_rate.peak"),
        ("distill.learning_rate.peak=.inf", "distill.learning_rate.peak"),
        ("distill.temperature=.nan", "distill.temperature"),
        ("distill.loss={forward_kl: .nan}", "distill.loss.forward_kl"),
        ("distill.loss={kl: 1}", "distill.loss.kl"),
        ("distill.loss=hinge", "distill.loss.hinge"),
        ("distill.loss={mse: adaptive}", "distill.loss.mse"),
        ("distill.loss={mse: {from: 1, to: -1}}", "distill.loss.mse.to"),
        ("distill.loss={mse: {from: 1, to: yes}}", "distill.loss.mse.to"),
        ("distill.loss={mse: [1, 2]}", "distill.loss.mse"),
        ("distill.loss={mse: yes}", "distill.loss.mse"),
        ("distill.top_k=0", "distill.top_k"),
        ("distill.adam.beta2=1", "distill.adam.beta2"),
        ("evaluate.tokens=0", "evaluate.tokens"),
        ("evaluate.tokens=some", "evaluate.tokens"),
        ("evaluate.task_items=-3", "evaluate.task_items"),
        ("prune.scores=taylor", "prune.scores"),
        ("prune.aggregation.batch=max", "prune.aggregation.batch"),
        ("prune.aggregations.heads.sequence=max", "prune.aggregations.heads.sequence"),
        ("prune.criteria.ffn=x_w1", "prune.criteria.ffn"),
        ("prune.criteria.heads=norm", "prune.criteria.heads"),
        ("prune.criteria={channels: final_norm}", "prune.criteria.channels"),
        ("prune.target.layers=0", "prune.target.layers"),
        ("precision=fp16", "precision"),
        ("parallel.tensor=0", "parallel.tensor"),
        ("parallel.layers_per_stage=odd", "parallel.layers_per_stage"),
        ("parallel.layers_per_stage=[2,0]", "parallel.layers_per_stage"),
        ("parallel.teacher=same", "parallel.teacher"),
        ("parallel.teacher={tensor: 0}", "parallel.teacher.tensor"),
        ("data.train=text.txt", "data.train"),
        ("name=../elsewhere", "name"),
        ("name=", "name"),
    ],
)
def test_a_wrong_value_is_one_problem_that_names_its_key(override: str, key: str, recipe_file: Recipes) -> None:
    file = recipe_file()
    (problem,) = problems(file, override)
    assert problem.startswith(f"{file}: {key}: "), problem


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("distill.stpes=3", "distill.stpes: unknown key 'stpes'; did you mean 'steps'?"),
        ("distill.learning_rate.warmup=3", "did you mean 'warmup_steps'?"),
        ("importance.aggregation=x", "importance.aggregation: unknown key 'aggregation'; known keys: block_sizes, micro_batch, "),
        ("parallel.teacher={tensr: 2}", "parallel.teacher.tensr: unknown key 'tensr'; did you mean 'tensor'?"),
        ("prune.aggregations.kv_groups.batch=l2", "prune.aggregations.kv_groups: unknown key 'kv_groups'; known keys: channels, experts, ffn, heads"),
        ("paralel.tensor=2", "paralel: unknown section 'paralel'; did you mean 'parallel'?"),
        ("zzz=1", "unknown section 'zzz'; known keys: "),
        ("distill.loss={mse: {from: 1, to: 0, stesp: 3}}", "distill.loss.mse.stesp: unknown key 'stesp'; did you mean 'steps'?"),
        ("distill.loss={mse: {from: 1, to: 0, until: 3}}", "unknown key 'until'; known keys: from, kind, steps, to"),
        ("distill.wandb={project: a, mod: offline}", "distill.wandb.mod: unknown key 'mod'; did you mean 'mode'?"),
    ],
)
def test_unknown_keys_get_the_nearest_known_one(override: str, mend: str, recipe_file: Recipes) -> None:
    (problem,) = problems(recipe_file(), override)
    assert mend in problem


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("distill.loss=cross_entropy", ("distill", "loss"), {"cross_entropy": 1.0}),
        ("distill.loss={forward_kl: 0.5, cross_entropy: 2}", ("distill", "loss"), {"forward_kl": 0.5, "cross_entropy": 2.0}),
        ("distill.loss={cross_entropy: 2}", ("distill", "loss"), {"cross_entropy": 2.0}),
        ("distill.loss={cosine: dynamic}", ("distill", "loss"), {"cosine": "dynamic"}),
        ("distill.loss.cross_entropy=2", ("distill", "loss"), {"forward_kl": 1.0, "cross_entropy": 2.0}),
        ("distill.learning_rate.peak=1e-4", ("distill", "learning_rate", "peak"), 1e-4),
        ("distill.learning_rate.minimum=4.5e-7", ("distill", "learning_rate", "minimum"), 4.5e-7),
        ("distill.adam.eps=1E-8", ("distill", "adam", "eps"), 1e-8),
        ("evaluate.tokens=all", ("evaluate", "tokens"), "all"),
        ("evaluate.tokens=512", ("evaluate", "tokens"), 512),
        ("evaluate.prompt=a = b", ("evaluate", "prompt"), "a = b"),
        ("data.train=[a.txt,b/*.txt]", ("data", "train"), ["a.txt", "b/*.txt"]),
        ("model.path=other/model", ("model", "path"), "other/model"),
        ("distill.wandb={project: p}", ("distill", "wandb", "project"), "p"),
        ("prune.target.layers=2", ("prune", "target", "layers"), 2),
    ],
)
def test_overrides_replace_the_recipes_values_with_yaml_types(override: str, place: tuple[str, ...], value: Any, recipe_file: Recipes) -> None:
    found: Any = load_recipe(recipe_file(distill={"loss": {"forward_kl": 1.0}}), [override])
    for part in place:
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_schedule_of_a_weight_is_written_as_it_is_read(recipe_file: Recipes) -> None:
    """`minitron show` prints recipes that can be used, and an artifact's identity is made of what it prints."""
    override = "distill.loss={forward_kl: 1, cross_entropy: {from: 0.5, to: 0, steps: 20}}"
    loss = load_recipe(recipe_file(), [override]).distill.loss
    shown = {"forward_kl": 1.0, "cross_entropy": {"from": 0.5, "to": 0.0, "kind": "cosine", "steps": 20}}
    assert load_recipe(recipe_file(), [override]).distill.shaping()["loss"] == shown
    assert load_recipe(recipe_file(distill={"steps": 100, "loss": shown})).distill.loss == loss


def test_the_last_of_two_overrides_wins_and_others_stay(recipe_file: Recipes) -> None:
    recipe = load_recipe(recipe_file(), ["distill.steps=7", "distill.steps=9"])
    assert (recipe.distill.steps, recipe.distill.global_batch, recipe.prune.target.ffn) == (9, 4, 16)


def test_exponents_without_a_point_are_numbers_in_the_file_too(recipe_file: Recipes) -> None:
    """PyYAML reads 1e-4 as text; a recipe must not."""
    file = recipe_file()
    file.write_text(file.read_text() + "precision: fp32\n")
    file.write_text(file.read_text().replace("steps: 100", "steps: 100\n  learning_rate: {peak: 1e-4, minimum: 1e-5}"))
    assert load_recipe(file).distill.learning_rate.peak == 1e-4


@pytest.mark.parametrize("override", ["distill.steps", "--steps", "200"])
def test_an_override_without_an_equals_sign_is_refused_with_an_example(override: str, recipe_file: Recipes) -> None:
    (problem,) = problems(recipe_file(), override)
    assert problem == f"override '{override}' is not of the form key=value, for example distill.steps=200"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: [1, 2\n", "no valid YAML"),
        ("a: b: c\n", "no valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping of sections"),
        ("just words\n", "just words: unknown section"),
        ("name: ${nowhere}\n", "no valid YAML"),
        ("name: a\nname: b\n", "no valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(text: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert any(problem.startswith(f"{file}: {what}") for problem in problems(file)), problems(file)
    assert problems(file, "distill.steps=3")  # an override changes nothing about that


@pytest.mark.parametrize("override", ["distill.learning_rate=[1", "model.path={a", "distill.steps.x=3", "data.train.0=a.txt"])
def test_an_override_that_cannot_be_read_is_one_line(override: str, recipe_file: Recipes) -> None:
    assert len(problems(recipe_file(), override)) == 1


def test_a_recipe_that_is_not_there_and_a_folder_in_its_place(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        (problem,) = problems(path)
        assert problem.startswith(f"{path}: no such recipe; ")


def test_an_empty_file_lists_what_a_recipe_needs(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert sorted(problem.split(": ")[1].split(" ")[0] for problem in problems(file)) == ["data", "distill", "model", "name", "prune"]


def test_a_loaded_recipe_cannot_be_changed(recipe_file: Recipes) -> None:
    recipe = load_recipe(recipe_file())
    with pytest.raises(pydantic.ValidationError):
        recipe.distill.steps = 3  # type: ignore[misc]


def test_hidden_losses_take_a_rule_or_pairs_and_a_number_or_dynamic(recipe_file: Recipes) -> None:
    assert load_recipe(recipe_file()).distill.hidden is None
    default = load_recipe(recipe_file(distill={"hidden": {}})).distill.hidden
    assert default is not None and (default.pairs, default.kind, default.weight) == ("last_minus_2", "cosine", "dynamic")
    given = load_recipe(recipe_file(), ["distill.hidden={pairs: [[29, 13], [5, 2]], weight: 2, kind: mse}"]).distill.hidden
    assert given is not None and (given.pairs, given.weight, given.kind) == ([(29, 13), (5, 2)], 2.0, "mse")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pairs=last", "distill.hidden.pairs: input should be last_minus_2, proportional, kept or a list of [teacher layer, student layer]"),
        ("pairs=[29, 13]", "distill.hidden.pairs: input should be last_minus_2, proportional, kept or a list of [teacher layer, student layer]"),
        ("pairs=[[29, 13, 1]]", "distill.hidden.pairs: input should be last_minus_2"),
        ("pairs=[[29.5, 13]]", "distill.hidden.pairs: input should be last_minus_2"),
        ("weight=0", "distill.hidden.weight: input should be a number above 0, or dynamic (found 0)"),
        ("weight=.inf", "distill.hidden.weight: input should be a number above 0, or dynamic"),
        ("weight=auto", "distill.hidden.weight: input should be a number above 0, or dynamic (found 'auto')"),
        ("weight=true", "distill.hidden.weight: input should not be true or false"),
        ("kind=relation", "distill.hidden.kind: input should be 'cosine' or 'mse'"),
        ("pair=kept", "distill.hidden.pair: unknown key 'pair'; did you mean 'pairs'?"),
    ],
)
def test_a_mistake_in_the_hidden_losses_is_one_line(recipe_file: Recipes, override: str, told: str) -> None:
    (found,) = problems(recipe_file(), f"distill.hidden.{override}")
    assert told in found


def test_an_axis_ranks_by_its_own_aggregation_and_the_rest_by_the_common_one(recipe_file: Recipes) -> None:
    given = {"aggregation": {"batch": "variance"}, "aggregations": {"heads": {"batch": "mean"}}, "criteria": {"ffn": "before_activation"}}
    ranking = load_recipe(recipe_file(prune=given), ["prune.aggregations.heads.sequence=l2"]).prune.ranking
    assert ranking.to_dict(sparse=False) == {
        "ffn": {"criterion": "before_activation", "batch": "variance", "sequence": "mean"},
        "heads": {"criterion": "per_channel", "batch": "mean", "sequence": "l2"},
        "kv_groups": {"criterion": "l2_over_heads", "batch": "mean", "sequence": "l2"},
        "channels": {"criterion": "layer_norms", "batch": "variance", "sequence": "mean"},
    }
    assert ranking.to_dict(sparse=True).keys() == {"experts", "expert_ffn", "heads", "kv_groups", "channels"}
