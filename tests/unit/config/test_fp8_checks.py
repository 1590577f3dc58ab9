"""What FP8 cannot do is refused in one line each, with its mend; what it can, pruning and search are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from shape_8b import LLAMA_8B, WIDTH, Recipes, problems

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.chain import STAGES, stage_id, stage_settings
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.checks.target import rounded_target
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.fp8 import Fp8
from minitron_megatron.config.schema import Recipe
from minitron_megatron.search.survey import survey

ODD = Architecture("llama", 4, 48, 6, 2, 8, 60, 131, True, 4096, 1e-6, 10000.0)  # queries 48, with keys and values 80 rows; neurons 60


@pytest.mark.parametrize(
    "overrides",
    [
        ["fp8.teacher=tensorwise", "fp8.student=delayed"],
        ["fp8.teacher=blockwise", "fp8.student=blockwise", "fp8.weights=true", "parallel.tensor=4", "parallel.sequence=true"],
        ["fp8.student=mxfp8", "fp8.first_last_layers_bf16=true"],
        ["fp8.teacher=nvfp4", "fp8.student=nvfp4"],
        ["fp8.student=delayed", "fp8.amax_history=16"],
        ["fp8.teacher=nvfp4", "fp8.student=tensorwise", "fp8.format=e4m3"],
    ],
)
def test_what_goes_together_is_taken(recipe_file: Recipes, overrides: list[str]) -> None:
    assert problems(recipe_file(**WIDTH), overrides) == []


@pytest.mark.parametrize("scaling", ["tensorwise", "nvfp4"])
def test_a_recipe_that_is_written_out_whole_is_the_same_one(recipe_file: Recipes, tmp_path: Path, scaling: str) -> None:
    """As the candidates of a search are, defaults of fields that the scaling does not read among them."""
    recipe = load_recipe(recipe_file(**WIDTH), [f"fp8.student={scaling}"])
    file = tmp_path / "whole.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    assert problems(file, []) == [] and load_recipe(file, []) == recipe


@pytest.mark.parametrize(
    ("overrides", "start", "mend"),
    [
        (["fp8={}"], "fp8: neither fp8.teacher nor fp8.student names a scaling", "name one of them"),
        (
            ["fp8.student=delayed", "fp8.first_last_layers_bf16=true"],
            "fp8.first_last_layers_bf16=true: with delayed scaling",
            "fp8.student=tensorwise",
        ),
        (["fp8.student=tensorwise", "fp8.amax_history=16"], "fp8.amax_history: only delayed scaling looks back", "fp8.student=delayed"),
        (["fp8.teacher=tensorwise", "fp8.weights=true"], "fp8.weights: of the student, which is not in FP8", "name fp8.student"),
        (
            ["fp8.student=tensorwise", "fp8.weights=true", "training.distributed_optimizer=false"],
            "fp8.weights=true: megatron casts FP8 weights in its distributed optimizer",
            "set training.distributed_optimizer=true",
        ),
        (["fp8.student=mxfp8", "fp8.weights=true"], "fp8.weights=true with fp8.student=mxfp8", "set fp8.weights=false"),
        (
            ["fp8.student=delayed", "fp8.weights=true"],
            "fp8.weights=true with fp8.student=delayed: weights are cast with the scale of earlier steps",
            "set fp8.weights=false",
        ),
        (["fp8.student=nvfp4", "fp8.weights=true"], "fp8.weights=true with fp8.student=nvfp4", "set fp8.weights=false"),
        (["fp8.teacher=tensorwise", "fp8.format=e4m3"], "fp8.format: of the student, which is not in FP8", "leave out"),
        (["fp8.student=nvfp4", "fp8.format=e4m3"], "fp8.format: nvfp4 has one format", "leave it out"),
        (["fp8.student=nvfp4", "fp8.emulated=true"], "fp8.emulated=true rounds to 8 bits", "choose another scaling"),
        (["fp8.student=delayed", "precision=fp32"], "precision=fp32: what is not FP8 beside it is bf16", "set bf16"),
        (["fp8.teacher=tensorwise", "teacher_precision=fp32"], "teacher_precision=fp32: what is not FP8", "set bf16"),
        (["fp8.student=delayed", "platform=cpu"], "fp8: a CPU multiplies in no FP8", "fp8.emulated=true"),
        (["fp8.student=nvfp4", "platform=cpu"], "fp8: a CPU multiplies in no FP8", "another scaling with fp8.emulated=true"),
        (
            ["fp8.student=tensorwise", "fp8.first_last_layers_bf16=true", "prune.target.layers=2"],
            "fp8.first_last_layers_bf16=true leaves none of 2 layers in FP8",
            "set it to false",
        ),
        (
            ["fp8.student=delayed", "distill.sequence_length=4088"],
            "distill.sequence_length=4088: FP8 delayed multiplies along",
            "nearest: 4080, 4096",
        ),
        (
            ["fp8.teacher=blockwise", "parallel.tensor=4", "parallel.sequence=true", "distill.sequence_length=1280"],
            "distill.sequence_length=1280: FP8 blockwise multiplies along the tokens of a rank, and needs a multiple of 512 under sequence",
            "nearest: 1024, 1536",
        ),
    ],
)
def test_each_problem_is_told_with_its_mend(recipe_file: Recipes, overrides: list[str], start: str, mend: str) -> None:
    found = [problem for problem in problems(recipe_file(**WIDTH), overrides) if problem.startswith(start)]
    assert found and mend in found[0], found or problems(recipe_file(**WIDTH), overrides)


def test_delayed_scaling_of_a_teacher_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match="learns its scales from the steps of a training, and a frozen teacher has none; use tensorwise"):
        Fp8(teacher="delayed")


def test_a_source_whose_sides_are_no_multiples_is_refused_side_by_side(recipe_file: Recipes) -> None:
    """By hand: of 48, 48, 80 and 60, the last alone is no multiple of 16; of 128 none is."""
    small = {"prune": {"target": {"hidden": 36}}, "distill": {"sequence_length": 128}}
    told = problems(recipe_file(**small), ["fp8.teacher=tensorwise"], ODD)
    assert told == ["fp8.teacher=tensorwise: the source model has ffn=60, and its matrices need multiples of 16; set fp8.teacher to none"]
    told = problems(recipe_file(**small), ["fp8.teacher=blockwise"], ODD)
    assert [line.split("=")[1].split("has ")[1] for line in told] == [
        "hidden",
        "heads × head_channels",
        "(heads + 2 × kv_groups) × head_channels",
        "ffn",
    ]


def test_stored_outputs_are_asked_of_the_layout_that_makes_them(recipe_file: Recipes) -> None:
    """teacher-logits takes context ranks as data-parallel ranks and has no layout of the teacher's own: 4112 = 257 × 16 tokens are whole there."""
    stored = {"distill": {"sequence_length": 4112, "teacher_outputs": "stored"}, "teacher_logits": {}, **{"prune": WIDTH["prune"]}}
    overrides = ["fp8.teacher=tensorwise", "parallel.context=2"]
    assert problems(recipe_file(**stored), overrides) == []
    live = problems(recipe_file(**stored), [*overrides, "distill.teacher_outputs=live"])
    assert [line for line in live if "needs a multiple of 32 under parallel.context=2" in line], live


def test_an_emulation_asks_for_no_sizes(recipe_file: Recipes) -> None:
    """It has no kernels, and small models are what a laptop tries."""
    overrides = ["fp8.teacher=blockwise", "fp8.student=blockwise", "fp8.emulated=true", "platform=cpu", "precision=fp32"]
    assert problems(recipe_file(), overrides, ODD) == []
    assert load_recipe(recipe_file(), overrides).fp8_multiple is None


def test_the_teachers_own_layout_is_what_its_sides_are_shared_by(recipe_file: Recipes) -> None:
    """14336 / 128 = 112 is even among 16 ranks and not among 32, which key/value groups would not be either."""
    model = replace(LLAMA_8B, ffn=14336 + 128)  # 113 blocks
    own = "parallel.teacher={tensor: 2}"
    found = problems(recipe_file(**WIDTH), ["fp8.teacher=blockwise", own, "parallel.tensor=2"], model)
    assert found == [
        "fp8.teacher=blockwise: the source model has ffn=14464, and its matrices need multiples of 128 on each of 2 tensor ranks; "
        "set fp8.teacher to tensorwise, which needs multiples of 16, or to none, or parallel.tensor to less"
    ]
    assert problems(recipe_file(**WIDTH), ["fp8.teacher=blockwise", "parallel.teacher={tensor: 1}", "parallel.tensor=2"], model) == []


@pytest.mark.parametrize(
    ("scaling", "tensor", "notes", "sizes"),
    [
        # 9200 → 144 × 64 = 9216 and 143 × 64 = 9152: 16 away and 48; 3070 → 3072
        ("delayed", 4, ["ffn 9200 → 9216 (multiple of 64 for FP8 delayed under tensor 4)"], (3072, 9216)),
        ("blockwise", 4, ["ffn 9200 → 9216 (multiple of 512 for FP8 blockwise under tensor 4)"], (3072, 9216)),
        ("tensorwise", 1, [], (3072, 9200)),
        ("mxfp8", 1, ["ffn 9200 → 9216 (multiple of 32 for FP8 mxfp8 under tensor 1)"], (3072, 9216)),
    ],
)
def test_pruning_rounds_to_what_fp8_needs(recipe_file: Recipes, scaling: str, tensor: int, notes: list[str], sizes: tuple[int, int]) -> None:
    file = recipe_file(prune={"target": {"hidden": 3070, "ffn": 9200}}, distill={"sequence_length": 4096})
    recipe = load_recipe(file, [f"fp8.student={scaling}", f"parallel.tensor={tensor}", f"prune.align.tensor={tensor}"])
    target, told = rounded_target(recipe.prune, LLAMA_8B, recipe.fp8_multiple)
    assert (target.hidden, target.ffn) == sizes and check_recipe(recipe, LLAMA_8B) == target
    assert [note for note in told if note.startswith("ffn")] == notes


def test_heads_are_kept_so_that_their_channels_fill_blocks() -> None:
    """Heads of 64 channels: two fill a block of 128, on each of two ranks."""
    model = replace(LLAMA_8B, family_name="nemotron", heads=64, head_channels=64, kv_groups=16)
    recipe = small_recipe({"heads": 42, "kv_groups": 13}, student="blockwise")
    target, told = rounded_target(recipe.prune, model, recipe.fp8_multiple)
    assert (target.heads, target.kv_groups) == (48, 12)
    assert told == [
        "kv_groups 13 → 12 (multiple of 4 for FP8 blockwise under tensor 2)",
        "heads 42 → 48 (multiple of 12)",  # of the groups alone
    ]


def test_a_multiple_is_fp8s_where_nothing_else_asks_for_as_much(recipe_file: Recipes) -> None:
    """9215: of 256 neurons by prune.align itself, which four ranks of 16 divide."""
    align = ["prune.align.ffn=256", "prune.align.tensor=4", "parallel.tensor=4"]
    file = recipe_file(prune={"target": {"hidden": 3072, "ffn": 9215}}, distill={"sequence_length": 4096})
    recipe = load_recipe(file, ["fp8.student=delayed", *align])
    assert rounded_target(recipe.prune, LLAMA_8B, recipe.fp8_multiple)[1] == ["ffn 9215 → 9216 (multiple of 256)"]


def test_a_multiple_that_fits_nowhere_is_refused_with_what_asked_for_it(recipe_file: Recipes) -> None:
    file = recipe_file(prune={"target": {"ffn": 12}}, distill={"sequence_length": 128})
    [problem] = [found for found in problems(file, ["fp8.student=blockwise"], ODD) if found.startswith("prune.align")]
    assert problem == (
        "prune.align: no multiple of 128 for FP8 blockwise under tensor 1 fits into the source's ffn=60; "
        "set prune.align.tensor to less, or fp8.student to another scaling, or to none"
    )


def test_a_layout_that_pruning_was_not_told_of_is_refused_with_the_mend(recipe_file: Recipes) -> None:
    """Layouts shape no artifact: pruning rounds for prune.align.tensor ranks, not for those of the moment."""
    file = recipe_file(prune={"target": {"ffn": 9216 + 16}}, distill={"sequence_length": 4096})
    [problem] = problems(file, ["fp8.student=delayed", "parallel.tensor=4"])
    assert problem == (
        "fp8.student=delayed: the pruned model has ffn=9232, and its matrices need multiples of 16 on each of 4 tensor ranks; nearest: 9216, 9280; "
        "set prune.align.tensor=4, which rounds what prune.target names"
    )
    assert problems(file, ["fp8.student=delayed", "parallel.tensor=4", "prune.align.tensor=4"]) == []


def test_widths_of_a_global_ranking_are_multiples_in_every_layer(recipe_file: Recipes) -> None:
    file = recipe_file(prune={"target": {"ffn": 9216}, "ffn_by": "global"}, distill={"sequence_length": 4096})
    [problem] = problems(file, ["fp8.student=delayed", "parallel.tensor=4"])
    assert problem.endswith("parallel.tensor=4 has to leave multiples of 16 on each rank (FP8); set prune.align.tensor=4")
    assert problems(file, ["fp8.student=delayed", "parallel.tensor=4", "prune.align.tensor=4"]) == []


def test_a_search_leaves_out_what_fp8_cannot_train(recipe_file: Recipes) -> None:
    space = {"space": {"ffn": [9216, 9200, 8960], "hidden": [3072, 3000]}, "parameters": 4.5e9, "tolerance": 0.5}
    recipe = load_recipe(recipe_file(prune=None, search=space, distill={"sequence_length": 4096}), ["fp8.student=blockwise"])
    found = survey(recipe, recipe.search, LLAMA_8B)  # type: ignore[arg-type]  # the recipe has one
    assert {(item.arch.hidden, item.arch.ffn) for item in found.survivors} == {(3072, 9216), (3072, 8960)}
    reason = next(item.reason for item in found.candidates if item.arch.ffn == 9200 and item.arch.hidden == 3072)
    assert reason == "fp8.student=blockwise: a candidate has ffn=9200, and its matrices need multiples of 128; nearest: 9088, 9216; " + (
        "or set fp8.student to tensorwise, which needs multiples of 16"
    )


def test_a_search_leaves_out_candidates_that_would_have_no_layer_in_fp8(recipe_file: Recipes) -> None:
    space = {"space": {"layers": [2, 16]}, "parameters": 4.5e9, "tolerance": 0.9}
    file = recipe_file(prune=None, search=space, distill={"sequence_length": 4096})
    recipe = load_recipe(file, ["fp8.student=tensorwise", "fp8.first_last_layers_bf16=true"])
    found = survey(recipe, recipe.search, LLAMA_8B)  # type: ignore[arg-type]  # the recipe has one
    assert {item.arch.layers for item in found.survivors} == {16}
    [reason] = {item.reason for item in found.candidates if item.arch.layers == 2}
    assert reason.startswith("fp8.first_last_layers_bf16=true leaves none of 2 layers in FP8")


def test_a_search_is_told_once_what_its_short_distillation_alone_cannot_do(recipe_file: Recipes) -> None:
    space = {"space": {"ffn": [9216]}, "parameters": 4.5e9, "tolerance": 0.9, "short_distillation": {"sequence_length": 1000}}
    file = recipe_file(prune=None, search=space, distill={"sequence_length": 4096})
    [problem] = problems(file, ["fp8.teacher=tensorwise"])
    assert problem.startswith("search.short_distillation, with what it does not name from distill: distill.sequence_length=1000: FP8 tensorwise")
    [known] = problems(recipe_file(prune=None, search=space, distill={"sequence_length": 1000}), ["fp8.teacher=tensorwise"])
    assert known.startswith("distill.sequence_length=1000")


def test_one_precision_of_both_models_is_told_once(recipe_file: Recipes) -> None:
    told = problems(recipe_file(**WIDTH), ["fp8.teacher=tensorwise", "fp8.student=tensorwise", "precision=fp32"])
    assert len(told) == 1 and told[0].startswith("precision=fp32")


def test_factors_of_a_search_give_widths_that_fp8_can_train(recipe_file: Recipes) -> None:
    space = {"space": {"ffn_factor": [2.9, 3.0], "hidden": [3072]}, "parameters": 4.5e9, "tolerance": 0.5}
    recipe = load_recipe(recipe_file(prune=None, search=space, distill={"sequence_length": 4096}), ["fp8.student=blockwise"])
    found = survey(recipe, recipe.search, LLAMA_8B)  # type: ignore[arg-type]  # the recipe has one
    assert sorted(item.arch.ffn for item in found.candidates) == [8960, 9216]  # 2.9 × 3072 = 8908.8 = 69.6 × 128


def small_recipe(target: dict[str, int] | None = None, **fp8: object) -> Recipe:
    values = {
        "name": "t",
        "model": {"path": "m"},
        "data": {"train": ["x"]},
        "chat": {"train": ["c"]},
        "correct": {"steps": 3, "source_peak": 1e-3},
        "labels": {},
        "teacher_logits": {},
        "prune": {"target": target or {"ffn": 8}, "align": {"tensor": 2} if target else {}},
        "distill": {"steps": 2},
        "finetune": {"steps": 2},
        "search": {"space": {"ffn": [8]}, "parameters": 5.0},
        "teachers": {"models": [{"path": "source"}]},
        "importance": {},
        "depth": {},
        **({"fp8": fp8} if fp8 else {}),
    }
    return Recipe.model_validate(values)


def test_artifacts_made_before_fp8_was_known_keep_their_names() -> None:
    """Written down as they were then."""
    known = {
        "importance": "de024c800aab781b",
        "correct": "6bfe1a760053d24f",
        "teacher-logits": "779ea21170ca05d2",
        "search": "65a484458526cda5",
        "prune": "261ed9db992bc4dc",
        "distill": "dc6a1010643c2674",
        "finetune": "4e39556cb1cfeeef",
        "evaluate": "f1ad1724f1776357",
        "export": "b0fd7b73074c937a",
    }
    assert {name: stage_id(STAGES[name], small_recipe(), {}) for name in known} == known


@pytest.mark.parametrize(
    ("fp8", "shaped"),
    [
        ({"student": "delayed"}, {"correct", "search", "prune", "distill", "finetune"}),
        ({"student": "delayed", "emulated": True}, {"correct", "search", "distill", "finetune"}),
        ({"teacher": "tensorwise"}, {"teacher-logits", "search", "distill"}),
        ({}, set()),
    ],
)
def test_fp8_shapes_what_is_computed_in_it_and_no_other_result(fp8: dict[str, object], shaped: set[str]) -> None:
    without, section = small_recipe(), Fp8.model_validate(fp8)
    recipe = without.model_copy(update={"fp8": section})
    changed = {name for name, stage in STAGES.items() if stage_settings(stage, recipe) != stage_settings(stage, without)}
    assert changed == shaped


def test_settings_that_a_scaling_does_not_read_shape_nothing() -> None:
    stage = STAGES["distill"]
    assert stage_settings(stage, small_recipe(student="tensorwise", margin=2)) == stage_settings(stage, small_recipe(student="tensorwise"))
    assert stage_settings(stage, small_recipe(student="delayed", margin=2)) != stage_settings(stage, small_recipe(student="delayed"))
    stored = STAGES["teacher-logits"]  # gradients are the student's alone
    both = {"teacher": "tensorwise", "student": "tensorwise"}
    assert stage_settings(stored, small_recipe(**both, format="e4m3")) == stage_settings(stored, small_recipe(**both))
    # a size that both scalings ask for is pruned once
    assert stage_settings(STAGES["prune"], small_recipe(student="delayed")) == stage_settings(STAGES["prune"], small_recipe(student="tensorwise"))


def test_a_distillation_from_stored_outputs_is_not_shaped_by_how_a_teacher_would_compute() -> None:
    recipe = small_recipe(teacher="tensorwise")
    stored = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"teacher_outputs": "stored"})})
    without = stored.model_copy(update={"fp8": None})
    assert stage_settings(STAGES["distill"], stored) == stage_settings(STAGES["distill"], without)
    assert stage_settings(STAGES["teacher-logits"], stored) != stage_settings(STAGES["teacher-logits"], without)
