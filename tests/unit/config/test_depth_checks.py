"""What section `depth` cannot ask for is refused with its mend; what it leaves open is settled, since a result depends on it."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.chain import STAGES, stage_inputs, stage_settings, stages_of
from minitron_megatron.config.checks.depth import settled_depth
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.depth import Depth
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError

SOURCE = Architecture("llama", 8, 24, 8, 2, 6, 40, 131, False, 64, 1e-5, 10000.0)


def recipe_of(depth: dict[str, Any] | None, layers: int | None = 6, **importance: Any) -> Recipe:
    lengths = {"sequence_length": 32}
    values = {
        "name": "tiny",
        "model": {"path": "a"},
        "data": {"train": ["x"]},
        "importance": {**lengths, **importance},
        "prune": {"target": {"layers": layers, "ffn": 32}},
        "distill": {**lengths, "steps": 100, "global_batch": 4},
        "evaluate": lengths,
        "depth": None if depth is None else {**lengths, **depth},
    }
    return Recipe.model_validate(values)


@pytest.mark.parametrize(
    ("depth", "layers", "problem"),
    [
        ({}, None, "depth: no layer is to be dropped; set prune.target.layers"),
        ({"drop": 3}, 6, "depth.drop=3 leaves 5 of 8 layers, but the target has 6; set prune.target.layers=5"),
        ({"first_protected": 4, "last_protected": 3}, 6, "leave 1 layers to choose 2 from; protect fewer"),
        ({"criterion": "task"}, 6, "depth.criterion=task with 0 depth.tasks; name lm-eval task files"),
        ({"tasks": ["a.yaml"]}, 6, "depth.criterion=perplexity with 1 depth.tasks; set depth.criterion=task"),
        ({"criterion": "influence", "removal": "greedy"}, 6, "use block or ranked"),
        ({"criterion": "influence"}, 6, "set importance.block_sizes=[2], or depth.removal=ranked"),
        ({"sequence_length": 65}, 6, "depth.sequence_length=65 is beyond the model's 64 positions"),
    ],
)
def test_what_cannot_be_chosen_is_refused(depth: dict[str, Any], layers: int | None, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_recipe(recipe_of(depth, layers), SOURCE)
    (line,) = error.value.problems
    assert problem in line


def test_a_block_longer_than_the_model_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"importance\.block_sizes: 9 is more than the model's 8 layers"):
        check_recipe(recipe_of(None, block_sizes=[2, 9]), SOURCE)


@pytest.mark.parametrize(
    ("depth", "importance"),
    [
        ({}, {}),
        ({"criterion": "logit_error", "drop": 2}, {}),
        ({"criterion": "influence"}, {"block_sizes": [2]}),
        ({"criterion": "influence", "removal": "ranked"}, {}),
    ],
)
def test_what_can_be_chosen_is_taken(depth: dict[str, Any], importance: dict[str, Any]) -> None:
    check_recipe(recipe_of(depth, **importance), SOURCE)


def test_another_number_of_layers_to_drop_is_another_result() -> None:
    """depth.drop left open follows from prune.target, which is no section of the stage."""

    def settings(layers: int) -> dict[str, Any]:
        recipe = recipe_of({}, layers)
        return stage_settings(STAGES["depth"], settled_depth(recipe, SOURCE, check_recipe(recipe, SOURCE)))

    assert settings(6)["depth"]["drop"] == 2 and settings(5)["depth"]["drop"] == 3
    assert settled_depth(recipe_of(None), SOURCE, SOURCE).depth is None


def test_the_stage_is_part_of_the_chain_where_the_recipe_asks_and_reads_what_it_measures_on() -> None:
    without, loss, influence = recipe_of(None), recipe_of({}), recipe_of({"criterion": "influence"})
    assert "depth" not in [stage.name for stage in stages_of(without)] and "depth" not in stage_inputs(STAGES["prune"], without)
    assert stage_inputs(STAGES["depth"], loss) == ("import", "data")
    assert stage_inputs(STAGES["depth"], influence) == ("import", "importance")
    assert stage_inputs(STAGES["prune"], loss) == ("import", "importance", "depth")
    assert Depth(criterion="logit_error").how == "greedy" and Depth().how == Depth(criterion="task").how == "block"


def test_layers_are_named_or_chosen_and_not_both() -> None:
    recipe = recipe_of({})
    both = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"drop_layers": [3, 4]})})
    with pytest.raises(RecipeError, match=r"prune.drop_layers names the layers that section depth would choose; leave one of them out"):
        check_recipe(both, SOURCE)
