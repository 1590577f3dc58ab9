"""FP8 in megatron's words: every setting is one that megatron's config takes, or one that this project has refused before."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.fp8 import Fp8, ModelFp8, Scaling
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError
from minitron_megatron.model.build import transformer_config
from minitron_megatron.model.fp8.flags import fp8_settings
from minitron_megatron.parallel.split import EndWork
from minitron_megatron.platform import Platform

SOURCE = Architecture("llama", 4, 256, 2, 2, 128, 512, 1024, False, 4096, 1e-5, 10000.0)
CUDA = Platform("cuda", "nccl", torch.device("cuda"))


def refused(fp8: Fp8, recompute: str) -> bool:
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "model": {"path": "m"},
            "data": {"train": ["x"]},
            "prune": {"target": {"ffn": 256}},
            "distill": {"steps": 200, "sequence_length": 128},
            "importance": {"sequence_length": 128},
            "evaluate": {"sequence_length": 128},
            "training": {"recompute": recompute},
        }
    )
    try:
        check_recipe(recipe.model_copy(update={"fp8": fp8}), SOURCE)
    except RecipeError:
        return True
    return False


def config(layout: Any, fp8: ModelFp8 | None, recompute: str = "none") -> Any:
    return transformer_config(SOURCE, layout, CUDA, torch.bfloat16, ends=EndWork(0, 0), recompute=recompute, fp8=fp8)


def taken_by_megatron(layout: Any, fp8: ModelFp8 | None, recompute: str) -> bool:
    try:
        config(layout, fp8, recompute)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_megatron_refuses_is_refused_before(layout: Any, recompute: str) -> None:
    """All students, with FP8 weights and without, ends in bf16 or not, emulated or not."""
    seen = set()
    for student, weights, ends, emulated in product(get_args(Scaling), (False, True), (False, True), (False, True)):
        fp8 = Fp8(student=student, weights=weights, first_last_layers_bf16=ends, emulated=emulated)
        ours, theirs = refused(fp8, recompute), taken_by_megatron(layout, fp8.of_student, recompute)
        assert ours or theirs, fp8
        seen.add((ours, theirs))
    assert seen == {(True, False), (True, True), (False, True)}  # each case is there: delayed scaling with ends is megatron's own refusal


@pytest.mark.parametrize("teacher", ["tensorwise", "blockwise", "mxfp8", "nvfp4"])
def test_a_teachers_weights_are_fp8(layout: Any, teacher: Any) -> None:
    made = config(layout, Fp8(teacher=teacher).of_teacher)
    assert (made.fp4_param and made.fp4 == "e2m1" and not made.fp8) if teacher == "nvfp4" else (made.fp8_param and made.fp8_recipe == teacher)


def test_an_emulation_is_no_business_of_megatrons(layout: Any) -> None:
    fp8 = Fp8(student="delayed", emulated=True).of_student
    assert fp8_settings(fp8) == fp8_settings(None) == {}
    made = config(layout, fp8)
    assert made.fp8 is None and made.emulated_fp8 == fp8


def test_delayed_scaling_looks_back_as_far_as_it_is_told(layout: Any) -> None:
    made = config(layout, Fp8(student="delayed", amax_history=16, amax_algorithm="most_recent", margin=1, format="e4m3").of_student)
    assert (made.fp8, made.fp8_amax_history_len, made.fp8_amax_compute_algo, made.fp8_margin) == ("e4m3", 16, "most_recent", 1)


def test_without_fp8_the_config_is_as_it_was(layout: Any) -> None:
    made = config(layout, None)
    assert made.fp8 is None and made.fp4 is None and not made.fp8_param and made.emulated_fp8 is None
