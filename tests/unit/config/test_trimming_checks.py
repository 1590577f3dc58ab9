"""What a recipe may cut: groups, widths of layers, given layers; and what alignment makes of its sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.checks.target import rounded_target
from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import RecipeError
from minitron_megatron.show import show_recipe

Recipes = Callable[..., Path]
# 3 heads in each of 4 groups
MODEL = Architecture("llama", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0)
FREE = Architecture("mistral", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0)
UNEVEN = FREE.resized(ffn=[60, 20, 30, 40, 50, 60])
EXPERTS = Architecture("mixtral", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0, None, None, 6, 2)
SINGLE = Architecture("mistral", 6, 48, 6, 6, 8, 60, 131, True, 128, 1e-6, 10000.0)


@pytest.fixture
def problems(recipe_file: Recipes) -> Callable[..., list[str]]:
    def check(*overrides: str, model: Architecture = FREE) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            check_recipe(load_recipe(recipe_file(prune={"target": {}}), list(overrides)), model)
        return caught.value.problems

    return check


@pytest.fixture
def target(recipe_file: Recipes) -> Callable[..., tuple[Architecture, list[str]]]:
    def make(*overrides: str, model: Architecture = FREE) -> tuple[Architecture, list[str]]:
        recipe = load_recipe(recipe_file(prune={"target": {}}), list(overrides))
        checked, rounded = check_recipe(recipe, model), rounded_target(recipe.prune, model)
        assert checked == rounded[0]
        return rounded

    return make


CASES = {
    "prune.target.kv_groups=5": ["prune.target.kv_groups=5 is larger than the source's 4", "prune.target.heads=15 is larger than the source's 12"],
    "prune.target={kv_groups: 2, heads: 5}": ["prune.target.heads=5 is not divisible by prune.target.kv_groups=2; nearest: 4, 6"],
    "prune.target={kv_groups: 2, heads: 8}": ["prune.target.heads=8, but 2 key/value groups have 6 in the source; at most 6"],
    "prune={head_residual: true, target: {heads: 4}}": [
        "prune.head_residual=true needs at least half of each group's heads: prune.target.heads=8; or set it to false"
    ],
    "prune.target.ffn=[20,30]": ["prune.target.ffn is a list of 2; it needs a width for each of the 6 kept layers, which have no experts"],
    "prune={drop_layers: 1-4, target: {ffn: [20, 61]}}": ["prune.target.ffn=[20, 61] is larger than the source's 60"],
    "prune.drop_layers=[0,6]": ["prune.drop_layers names layer 6 of the source, which has layers 0 to 5"],
    "prune.drop_layers=0-5": ["prune.drop_layers drops every layer; leave one at least"],
    "prune={drop_layers: 1-3, target: {layers: 4}}": ["prune.target.layers=4, but prune.drop_layers leaves 3 of 6; leave one of the two out"],
    "prune={ffn_by: global, target: {ffn: 60}}": [
        "prune.ffn_by=global ranks neurons over all layers: it needs prune.target.ffn, one number below the source's 60, and no experts"
    ],
    "prune={align: {ffn: 64}, target: {ffn: 40}}": ["prune.align: no multiple of 64 fits into the source's ffn=60; align ffn to less"],
    "prune={align: {tensor: 8}, target: {ffn: 40, kv_groups: 2}}": [
        "prune.align: no multiple of 8 fits into the source's kv_groups=4; align kv_groups to less",
    ],
    "prune={align: {tensor: 5}, target: {ffn: 40}}": [
        "prune.align.tensor=5 does not divide kv_groups=4, which is not pruned; name a smaller prune.target.kv_groups",
        "prune.align.tensor=5 does not divide heads=12, which is not pruned; name a smaller prune.target.heads",
    ],
}


@pytest.mark.parametrize("override", CASES)
def test_each_mistake_is_told_with_its_mend(override: str, problems: Callable[..., list[str]]) -> None:
    assert problems(override) == CASES[override]


def test_the_residual_needs_heads_that_are_left_in_the_group(problems: Callable[..., list[str]]) -> None:
    found = problems("prune={head_residual: true, target: {kv_groups: 3}}", model=SINGLE)
    assert found == ["prune.head_residual=true: each head is a key/value group of its own, and no head of it is left to add to; set it to false"]


@pytest.mark.parametrize("ffn", ["[8, 16, 8, 16, 8, 16]", "16, ffn_by: global"])
def test_experts_have_one_width(ffn: str, problems: Callable[..., list[str]]) -> None:
    prune = f"prune={{target: {{ffn: {ffn.split(', ffn_by')[0]}}}{', ffn_by: global' if 'global' in ffn else ''}}}"
    (problem,) = problems(prune, model=EXPERTS)
    assert "no experts" in problem


def test_every_layers_width_must_divide_over_tensor_ranks(problems: Callable[..., list[str]]) -> None:
    assert problems("prune.target.ffn=[20,20,30,20,20,50]", "parallel.tensor=4") == [
        f"parallel.tensor=4 does not divide the pruned model's {width} ffn; tensor sizes that do: 1, 2" for width in (30, 50)
    ]
    assert problems("prune={ffn_by: global, target: {ffn: 20}}", "parallel.tensor=4") == [
        "prune.ffn_by=global: parallel.tensor=4 has to divide every layer's width; set prune.align.tensor=4"
    ]


def test_widths_of_a_source_whose_layers_differ(problems: Callable[..., list[str]], target: Callable[..., tuple[Architecture, list[str]]]) -> None:
    found = problems("prune.target.layers=4", model=UNEVEN)
    assert found == [
        "prune.target.ffn: the source's layers differ in width, and the scores decide which are kept; name a width, or prune.drop_layers"
    ]
    assert target("prune.drop_layers=[1,3]", model=UNEVEN)[0].ffn_widths == (60, 30, 50, 60)
    assert target("prune={target: {layers: 4, ffn: 20}}", model=UNEVEN)[0].ffn_widths == (20,) * 4
    assert target(model=UNEVEN)[0] == UNEVEN
    assert problems("prune.target.ffn=25", model=UNEVEN) == ["prune.target.ffn=25 of kept layer 1 is larger than the 20 that it has in the source"]


@pytest.mark.parametrize(
    ("ffn", "widths"),
    [
        # a layer's own width stays, between two multiples too; what is cut is rounded within its own layer
        ("[60, 20, 30, 40, 50, 60]", (60, 20, 30, 40, 50, 60)),
        ("[44, 20, 29, 36, 49, 12]", (48, 20, 24, 40, 48, 16)),
        ("20", (20,) * 6),
        ("19", (16,) * 6),
    ],
)
def test_widths_are_rounded_within_each_layer_of_a_source_whose_layers_differ(
    ffn: str, widths: tuple[int, ...], target: Callable[..., tuple[Architecture, list[str]]]
) -> None:
    assert target(f"prune={{align: {{ffn: 8}}, target: {{ffn: {ffn}}}}}", model=UNEVEN)[0].ffn_widths == widths


@pytest.mark.parametrize(
    ("prune", "problem"),
    [
        ("{target: {ffn: 44}}", "prune.target.ffn=44 on average is more than the kept layers have in the source; at most 43"),
        ("{target: {ffn: 48}, align: {ffn: 8}}", "prune.target.ffn=48 on average is more than the kept layers have in the source; at most 40"),
        (
            "{target: {ffn: 36, layers: 4}}",
            "prune.target.ffn=36 on average is more than the narrowest layers, which the scores may keep, have in the source; at most 35",
        ),
        ("{target: {ffn: 32}, align: {ffn: 32}}", "a layer of 20 neurons has no whole block of 32; set prune.align.ffn and .tensor to less"),
    ],
)
def test_a_budget_that_layers_of_different_widths_do_not_hold_is_refused_ahead(prune: str, problem: str, problems: Callable[..., list[str]]) -> None:
    """Widths 60, 20, 30, 40, 50, 60: found out by the plan, it would be after hours of importance."""
    assert problems(f"prune={{ffn_by: global, {prune[1:]}", model=UNEVEN) == [f"prune.ffn_by=global: {problem}"]


@pytest.mark.parametrize(("written", "layers"), [("2", [2]), ("[1,3-5]", [1, 3, 4, 5]), ("4-5", [4, 5]), ("'0, 2-3'", [0, 2, 3]), ("[5, 0]", [0, 5])])
def test_layers_to_drop_are_numbers_and_ranges(written: str, layers: list[int], recipe_file: Recipes) -> None:
    recipe = load_recipe(recipe_file(), [f"prune.drop_layers={written}"])
    assert recipe.prune.drop_layers == layers
    assert check_recipe(recipe, FREE).layers == 6 - len(layers)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("prune.drop_layers=5-3", "prune.drop_layers: input should be a list of layer numbers, counted from 0, and ranges such as 16-30"),
        ("prune.drop_layers=[1,a]", "prune.drop_layers: input should be a list of layer numbers"),
        ("prune.drop_layers=[1,-2]", "prune.drop_layers: input should be a list of layer numbers"),
        ("prune.drop_layers=[2,1-3]", "prune.drop_layers: a layer is named twice"),
        ("prune.target.ffn=0", "prune.target.ffn: input should be a whole number of 1 or more, or a list of them (found 0)"),
        ("prune.target.ffn=[8,0]", "prune.target.ffn: input should be a whole number of 1 or more, or a list of them"),
        ("prune.target.ffn=[]", "prune.target.ffn: input should be a whole number"),
        ("prune.align.ffn=0", "prune.align.ffn: input should be greater than or equal to 1"),
        ("prune.ffn_by=depth", "prune.ffn_by: input should be 'layer' or 'global'"),
    ],
)
def test_a_wrong_value_is_one_problem_that_names_its_key(override: str, problem: str, recipe_file: Recipes) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(), [override])
    (found,) = caught.value.problems
    assert problem in found


ROUNDED = {
    # nearest; up of two as near; down where up is beyond the source; the source's own size stays
    "{align: {ffn: 8}, target: {ffn: 43}}": ({"ffn": 40}, ["ffn 43 → 40 (multiple of 8)"]),
    "{align: {ffn: 8}, target: {ffn: 44}}": ({"ffn": 48}, ["ffn 44 → 48 (multiple of 8)"]),
    "{align: {ffn: 8}, target: {ffn: 59}}": ({"ffn": 56}, ["ffn 59 → 56 (multiple of 8)"]),
    "{align: {ffn: 8}, target: {ffn: 1}}": ({"ffn": 8}, ["ffn 1 → 8 (multiple of 8)"]),
    "{align: {ffn: 8}, target: {ffn: 60}}": ({"ffn": 60}, []),
    "{align: {ffn: 8}, target: {ffn: 48}}": ({"ffn": 48}, []),
    "{align: {ffn: 8}, target: {ffn: [9, 8, 60, 33, 20, 20]}}": (
        {"ffn": [8, 8, 60, 32, 24, 24]},
        ["ffn [9, 8, 60, 33, 20, 20] → [8, 8, 60, 32, 24, 24] (multiple of 8)"],
    ),
    "{align: {ffn: 6, tensor: 4}, target: {ffn: 40, kv_groups: 4}}": ({"ffn": 36}, ["ffn 40 → 36 (multiple of 12)"]),
    # groups first, then heads in those groups
    "{align: {tensor: 2}, target: {kv_groups: 3, heads: 9}}": (
        {"kv_groups": 4, "heads": 8},
        ["kv_groups 3 → 4 (multiple of 2)", "heads 9 → 8 (multiple of 4)"],
    ),
    "{align: {heads: 2}, target: {heads: 10}}": ({"heads": 12}, ["heads 10 → 12 (multiple of 4)"]),
    "{align: {kv_groups: 2}, target: {kv_groups: 1}}": ({"kv_groups": 2, "heads": 6}, ["kv_groups 1 → 2 (multiple of 2)"]),
    "{align: {heads: 4}, target: {kv_groups: 2, heads: 6}}": ({"kv_groups": 2, "heads": 6}, []),
    "{align: {heads: 4}, target: {kv_groups: 2, heads: 5}}": ({"kv_groups": 2, "heads": 4}, ["heads 5 → 4 (multiple of 4)"]),
    "{align: {hidden: 16}, target: {hidden: 39}}": ({"hidden": 32}, ["hidden 39 → 32 (multiple of 16)"]),
}


@pytest.mark.parametrize("prune", ROUNDED)
def test_sizes_are_rounded_and_what_changed_is_told(prune: str, target: Callable[..., tuple[Architecture, list[str]]]) -> None:
    sizes, notes = ROUNDED[prune]
    assert target(f"prune={prune}") == (FREE.resized(**sizes), notes)


def test_hidden_is_a_multiple_of_the_heads_too_where_transformers_asks_for_it(target: Callable[..., tuple[Architecture, list[str]]]) -> None:
    found, notes = target("prune={align: {hidden: 6}, target: {hidden: 39, heads: 8}}", model=MODEL)
    assert (found.hidden, notes) == (48, ["hidden 39 → 48 (multiple of 24)"])


def test_groups_without_a_number_of_heads_keep_all_of_theirs(target: Callable[..., tuple[Architecture, list[str]]]) -> None:
    assert target("prune.target.kv_groups=3")[0] == FREE.resized(kv_groups=3, heads=9)


def test_alignment_may_name_the_recipes_own_tensor_size(target: Callable[..., tuple[Architecture, list[str]]], recipe_file: Recipes) -> None:
    """The number, not the name, is part of the result's identity: another layout of the same pruned model changes nothing."""
    file = recipe_file(parallel={"tensor": 4}, prune={"target": {"ffn": 42}, "align": {"tensor": "${parallel.tensor}"}})
    recipe = load_recipe(file)
    assert recipe.prune.shaping()["align"]["tensor"] == 4
    assert check_recipe(recipe, FREE).ffn == 44


def test_show_tells_what_rounding_changed_and_what_an_export_is_like(recipe_file: Recipes) -> None:
    prunes = {
        "{align: {ffn: 8}, target: {ffn: 43}}": ["Rounded: ffn 43 → 40 (multiple of 8)"],
        "{ffn_by: global, align: {ffn: 4}, target: {ffn: 20}}": ["20 a layer on average", "Exported to Hugging Face"],
        "{drop_layers: 1-4, target: {ffn: [20, 40]}}": ["Dropped layers: 1, 2, 3, 4", "FFN widths: 20, 40", "Exported to Hugging Face"],
        "{target: {ffn: 43}}": [],
    }
    for prune, expected in prunes.items():
        recipe, console = load_recipe(recipe_file(), [f"prune={prune}"]), Console(record=True, width=160)
        show_recipe(recipe, FREE, check_recipe(recipe, FREE), console)
        told = console.export_text()
        assert all(text in told for text in expected)
        assert ("Rounded" in told, "Exported" in told) == ("Rounded" in str(expected), "Exported" in str(expected))
