"""Budgets against figures that are added up tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.families import FAMILIES
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.checks.target import target_architecture
from minitron_megatron.config.prune import Prune
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.trial import trial_recipe
from minitron_megatron.errors import RecipeError
from minitron_megatron.search.space import cut_sizes
from minitron_megatron.search.survey import Survey, require_survivors, survey

from .conftest import LARGE, SMALL
from .test_space import MINITRON_4B, MINITRON_8B, P1_4B, P1_8B

Recipes = Callable[..., Recipe]
SPACE = {"layers": [2, 3, 4], "hidden": [16, 24, 32], "heads": [4, 8], "ffn": {"min": 16, "max": 48, "step": 8}}


def found_by(recipe: Recipe, source: Architecture = SMALL) -> Survey:
    assert recipe.search
    return survey(recipe, recipe.search, source)


def elements(arch: Architecture, *, embedding: bool) -> int:
    """By the shapes of the checkpoint's tensors."""
    total = 0
    for row in tensor_table(arch):
        if embedding or "V" not in row.axes:
            count = 1
            for size in row.shape(arch):
                count *= size
            total += count
    return total


def test_survivors_are_those_that_counting_tensors_finds(recipe_of: Recipes) -> None:
    limits = {"parameters": 20000, "nonembedding_parameters": 16000, "tolerance": 0.2}
    found = found_by(recipe_of(SPACE, **limits, memory={"gib": 1e-4, "batch": 3, "context": 100, "weights": "int8", "kv_cache": "fp32"}))
    expected = set()
    for layers, hidden, heads, ffn in product((2, 3, 4), (16, 24, 32), (4, 8), range(16, 49, 8)):
        arch = SMALL.resized(layers=layers, hidden=hidden, heads=heads, ffn=ffn)
        cache = 3 * 100 * layers * 2 * SMALL.kv_groups * SMALL.head_channels * 4
        fits = abs(elements(arch, embedding=True) - 20000) <= 4000 and abs(elements(arch, embedding=False) - 16000) <= 3200
        if fits and elements(arch, embedding=True) + cache <= 1e-4 * 2**30:
            expected.add(arch)
    assert 0 < len(expected) < len(found.candidates) == 90
    assert {candidate.arch for candidate in found.survivors} == expected


def test_each_candidate_is_counted_under_the_first_budget_that_removes_it(recipe_of: Recipes) -> None:
    found = found_by(recipe_of(SPACE, parameters=20000, memory={"gib": 3e-5}, parallel={"tensor": 2}))
    first = {name: count for name, _, _, count in found.removals()}
    assert sum(first.values()) + len(found.survivors) == len(found.candidates)
    assert first["parameters"] > 0 and first["memory"] > 0 and set(first) == {"parameters", "memory", "recipe"}


def test_shapes_that_the_family_or_the_layout_cannot_have_are_removed_with_the_reason(recipe_of: Recipes) -> None:
    space = {"hidden": [16, 20, 32], "layers": [1, 4]}
    found = found_by(recipe_of(space, parallel={"pipeline": 2}, memory={"gib": 1}))
    assert {(item.arch.hidden, item.arch.layers): bool(item.reason) for item in found.candidates} == {
        (16, 4): False, (32, 4): False, (20, 4): True, (16, 1): True, (20, 1): True, (32, 1): True,
    }  # fmt: skip
    reasons = " ".join(item.reason for item in found.candidates)
    assert "hidden=20 is not a multiple of heads=8" in reasons and "more than a candidate's 1 layers" in reasons


def test_a_list_of_layers_per_stage_leaves_shapes_of_its_own_number_and_all_where_it_is_the_source_s(recipe_of: Recipes) -> None:
    for counts, left in (([1, 2], {3}), ([2, 2], {2, 3})):
        recipe = recipe_of({"layers": [2, 3]}, parallel={"pipeline": 2, "layers_per_stage": counts}, memory={"gib": 1})
        found = found_by(recipe)
        assert {item.arch.layers for item in found.survivors} == left
        for item in found.candidates:  # as the job of a candidate is told
            trial = trial_recipe(recipe, recipe.search, cut_sizes(item.arch, SMALL))  # type: ignore[arg-type]
            told = _problem_of(trial)
            assert told == item.reason and ("layers_per_stage" in told) == (item.arch.layers not in left)


def _problem_of(recipe: Recipe) -> str:
    try:
        check_recipe(recipe, SMALL)
        return ""
    except RecipeError as error:
        return str(error)


SHORT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "labels": (
        {"labels": {"prompt_tokens": 16, "new_tokens": 10}},
        {"sequence_length": 16},
        "labels.prompt_tokens + labels.new_tokens = 26 does not fit into a sample",
    ),
    "virtual stages": ({"parallel": {"pipeline": 2, "virtual": 2}}, {"global_batch": 3}, "parallel.virtual=2 needs a multiple of"),
    "the teacher's layout": (
        {"parallel": {"data": 2, "teacher": {"tensor": 2, "sequence": True}}},
        {"sequence_length": 31},
        "distill.sequence_length=31 is not divisible by parallel.teacher.tensor=2",
    ),
}


@pytest.mark.parametrize("case", SHORT)
def test_what_the_short_distillation_alone_cannot_have_is_told_before_the_search(recipe_of: Recipes, case: str) -> None:
    sections, short, problem = SHORT[case]
    whole = Recipe.model_validate({**recipe_of({"ffn": [16]}, parameters=1).model_dump(), **sections})
    check_recipe(whole, SMALL)
    assert whole.search
    search = whole.search.model_copy(update={"short_distillation": whole.search.short_distillation.model_copy(update=short)})
    (line,) = _problem_of(whole.model_copy(update={"search": search})).splitlines()
    assert line.startswith("search.short_distillation, with what it does not name from distill: ") and problem in line


def test_nothing_left_names_what_removed_it_and_the_nearest_miss(recipe_of: Recipes) -> None:
    found = found_by(recipe_of(SPACE, parameters=100000))
    largest = SMALL.resized(layers=4, hidden=32, heads=8, ffn=48)
    with pytest.raises(RecipeError) as caught:
        require_survivors(found)
    (line,) = caught.value.problems
    assert "none of 90 candidates is left (parameters removes 90); nearest miss: L4-D32-H8-G2-F48: parameters" in line
    assert f"{elements(largest, embedding=True):,}" in line and "100,000 ± 5 % is allowed" in line and "widen search.space" in line


def test_where_shapes_fit_the_budget_and_none_can_be_made_the_reason_is_told(recipe_of: Recipes) -> None:
    within = SMALL.resized(hidden=20, ffn=16)
    found = found_by(recipe_of({"hidden": [20], "ffn": [16, 48]}, parameters=elements(within, embedding=True)))
    with pytest.raises(RecipeError, match=r"parameters removes 1, recipe removes 1\); .*hidden=20 is not a multiple of heads=8"):
        require_survivors(found)


def test_figures_on_the_edge_of_a_tolerance_are_inside(recipe_of: Recipes) -> None:
    total = elements(SMALL, embedding=True)
    for target in (total / 1.05, total / 0.95):
        assert len(found_by(recipe_of({"layers": [4]}, parameters=target)).survivors) == 1
    assert not found_by(recipe_of({"layers": [4]}, parameters=total / 1.0501)).survivors


def test_ten_thousand_candidates_are_all_judged(recipe_of: Recipes) -> None:
    """How many seconds that takes stands in the report, not in a test: the machine is others' too."""
    space = {
        "layers": {"min": 16, "max": 32, "step": 1},
        "heads": [16, 24, 32, 40, 48],
        "ffn": {"min": 8192, "max": 24576, "step": 1024},
        "hidden": {"min": 4096, "max": 6144, "step": 256},
    }
    found = found_by(recipe_of(space, parameters=8e9, latency={"gpu": "H100_SXM", "limit_ms": 1500}), LARGE)
    assert len(found.candidates) == 17 * 5 * 17 * 9
    assert all(candidate.figures["latency"] > 0 for candidate in found.candidates)
    assert 0 < len(found.survivors) < len(found.candidates)


@pytest.mark.skipif("nemotron" not in FAMILIES, reason="the family is not there")
@pytest.mark.parametrize(("space", "target", "published"), [(P1_8B, 8.27e9, MINITRON_8B), (P1_4B, 4.19e9, MINITRON_4B)])
def test_the_published_minitron_fits_its_own_budget(recipe_of: Recipes, space: dict, target: float, published: dict) -> None:
    from dataclasses import replace

    source = replace(LARGE, family_name="nemotron")
    found = found_by(recipe_of(space, parameters=target), source)
    assert source.resized(**published) in [candidate.arch for candidate in found.survivors]
    assert len(found.survivors) < len(found.candidates) / 2


def test_shapes_that_alignment_would_change_are_removed_and_the_others_are_what_pruning_makes(recipe_of: Recipes) -> None:
    plain = recipe_of({"ffn": [16, 24, 32, 48], "heads": [6, 8]}, memory={"gib": 1})
    recipe = Recipe.model_validate({**plain.model_dump(), "prune": {"align": {"ffn": 16, "heads": 4}}})
    found = found_by(recipe)
    assert {(item.arch.ffn, item.arch.heads) for item in found.survivors} == {(16, 8), (32, 8), (48, 8)}
    assert all("prune.align would round" in item.reason for item in found.candidates if item.arch.ffn == 24)
    for item in found.survivors:
        told = Prune.model_validate({**recipe.prune.model_dump(), "target": cut_sizes(item.arch, SMALL)})
        assert target_architecture(recipe.model_copy(update={"prune": told}), SMALL) == item.arch


def test_groups_take_their_heads_along_unless_heads_are_named(recipe_of: Recipes) -> None:
    alone = found_by(recipe_of({"kv_groups": [1, 2]}, memory={"gib": 1}))
    assert {(item.arch.kv_groups, item.arch.heads) for item in alone.survivors} == {(1, 4), (2, 8)}
    named = found_by(recipe_of({"kv_groups": [1, 2], "heads": [2, 8]}, memory={"gib": 1}))
    assert {(item.arch.kv_groups, item.arch.heads) for item in named.survivors} == {(1, 2), (2, 2), (2, 8)}
    (left_out,) = [item for item in named.candidates if item.reason]
    assert "prune.target.heads=8, but 1 key/value groups have 4 in the source" in left_out.reason


BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"depth": {"sequence_length": 32}}, "depth: how many layers it drops follows from the target, which the search has yet to choose"),
    "widths of layers": ({"prune": {"ffn_by": "global"}}, "prune.ffn_by=global gives layers widths of their own"),
    "named layers": ({"prune": {"drop_layers": [1]}}, "prune.drop_layers: the search chooses how many layers go"),
    "a moving teacher": (
        {"correct": {"steps": 200, "sequence_length": 32, "global_batch": 4, "beside": True, "source_peak": 1e-4, "learning_rate": {}}},
        "correct.beside: candidates trained at different times would have different teachers",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_candidates_cannot_follow_is_refused_with_the_reason(recipe_of: Recipes, case: str) -> None:
    sections, problem = BESIDE[case]
    recipe = Recipe.model_validate({**recipe_of({"ffn": [16]}, parameters=1).model_dump(), **sections})
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe, SMALL)
    (line,) = caught.value.problems
    assert line.startswith(problem)


def test_a_source_with_ffns_of_different_widths_is_not_searched(recipe_of: Recipes) -> None:
    with pytest.raises(RecipeError, match="the source's layers have FFNs of different widths"):
        check_recipe(recipe_of({"hidden": [16]}, parameters=1), SMALL.resized(ffn=[48, 32, 48, 48]))


def test_a_mistake_in_a_correction_s_batch_is_told_once_and_not_of_the_candidates(recipe_of: Recipes) -> None:
    correct = {"steps": 200, "sequence_length": 32, "global_batch": 3, "micro_batch": 2, "source_peak": 1e-4, "learning_rate": {}}
    recipe = Recipe.model_validate({**recipe_of({"ffn": [16]}, parameters=1).model_dump(), "correct": correct})
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe, SMALL)
    (line,) = caught.value.problems
    assert line.startswith("correct.global_batch=3 is not divisible by")


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "layers above": ({"space": {"layers": [5]}, "parameters": 1}, "search.space.layers: 5 is larger than the source's 4"),
    "no experts": ({"space": {"experts": [2]}, "parameters": 1}, "the family llama has no experts"),
    "no axis": ({"space": {}, "parameters": 1}, "search.space names no axis; axes: layers, hidden"),
    "two widths": ({"space": {"ffn": [8], "ffn_factor": [1]}, "parameters": 1}, "ffn and ffn_factor both give FFN widths"),
    "odd": ({"space": {"ffn": [12], "alignment": 8}, "parameters": 1}, "search.space.ffn: 12 are no multiples of search.space.alignment=8"),
    "no budget": ({"space": {"ffn": [8]}}, "search has no budget"),
    "no gpu": ({"space": {"ffn": [8]}, "latency": {"limit_ms": 1}}, "search.latency.gpu is missing"),
    "long": (
        {"space": {"ffn": [8]}, "latency": {"limit_ms": 1, "gpu": "L4", "prompt": 100, "generate": 29}},
        "prompt + generate = 129 is beyond the model's 128",
    ),
    "warm-up": (
        {"space": {"ffn": [8]}, "parameters": 1, "short_distillation": {"rounds": [5, 20]}},
        "warmup_steps=40 must be less than rounds[-1]=20",
    ),
    "batch": ({"space": {"ffn": [8]}, "parameters": 1, "short_distillation": {"micro_batch": 3}}, "global_batch=4 is not divisible by"),
    "length": ({"space": {"ffn": [8]}, "parameters": 1, "short_distillation": {"sequence_length": 200}}, "sequence_length=200 is beyond the model's"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_search_that_cannot_be_is_refused_before_anything_runs(recipe_of: Recipes, case: str) -> None:
    search, problem = PROBLEMS[case]
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe_of(**search), SMALL)
    assert any(problem in line for line in caught.value.problems), caught.value.problems


def test_sizes_beside_a_search_and_neither_of_them_are_refused(recipe_of: Recipes) -> None:
    both = recipe_of({"ffn": [8]}, parameters=1)
    both = Recipe.model_validate({**both.model_dump(), "prune": {"target": {"ffn": 8}}})
    neither = Recipe.model_validate({**both.model_dump(), "prune": {}, "search": None})
    for recipe, words in ((both, "prune.target: the search chooses the sizes"), (neither, "prune.target is missing")):
        with pytest.raises(RecipeError, match=words):
            check_recipe(recipe, SMALL)
