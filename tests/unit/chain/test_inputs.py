"""A stage takes only inputs that were made for the same recipe and from the same model."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from minitron_megatron.artifact import Artifact
from minitron_megatron.chain import STAGES, refuse_foreign_inputs, run_id, stage_id, stage_inputs, stage_settings
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.evaluate import Evaluate
from minitron_megatron.config.importance import Importance
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune, Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.source import Data, Model
from minitron_megatron.errors import ArtifactError


def recipe_of(model: str = "a", ffn: int = 8) -> Recipe:
    return Recipe(name="tiny", model=Model(path=model), data=Data(train=["x"]), prune=Prune(target=Target(ffn=ffn)), distill=Distill(steps=2))


def artifact(stage: str, recipe: Recipe, identity: str, **inputs: str) -> Artifact:
    return Artifact(Path("runs/tiny") / stage, {"id": identity, "settings": stage_settings(STAGES[stage], recipe), "inputs": inputs})


def test_inputs_of_one_recipe_and_one_model_are_taken() -> None:
    recipe = recipe_of()
    original = artifact("import", recipe, "i1")
    refuse_foreign_inputs({"import": original, "prune": artifact("prune", recipe, "p1", **{"import": "i1"})}, recipe, "r.yaml")


def test_a_student_that_was_cut_from_another_teacher_is_refused() -> None:
    recipe = recipe_of()
    inputs = {"import": artifact("import", recipe, "i2"), "prune": artifact("prune", recipe, "p1", **{"import": "i1"})}
    with pytest.raises(ArtifactError, match=r"prune was made from another import than .*make it anew with: minitron prune r.yaml"):
        refuse_foreign_inputs(inputs, recipe, "r.yaml")


@pytest.mark.parametrize(("stage", "other"), [("import", recipe_of(model="b")), ("prune", recipe_of(ffn=4))])
def test_an_input_of_another_recipe_is_refused_with_the_command_that_mends_it(stage: str, other: Recipe) -> None:
    with pytest.raises(ArtifactError, match=f"made with other settings than this recipe's .*; make it anew with: minitron {stage} r.yaml"):
        refuse_foreign_inputs({stage: artifact(stage, other, "x")}, recipe_of(), "r.yaml")


def test_how_often_a_pass_saves_is_no_part_of_its_identity() -> None:
    """What a field says of the work alone must not throw a finished stage away; the recipe in the manifest still tells it."""
    stage = STAGES["importance"]
    often, seldom, other = (
        recipe_of().model_copy(update={"importance": Importance(**values)}) for values in ({"save_every_samples": 1}, {}, {"seed": 2})
    )
    assert stage_settings(stage, often) == stage_settings(stage, seldom) != stage_settings(stage, other)
    assert stage_settings(stage, often)["importance"].keys() == Importance.model_fields.keys() - {"save_every_samples"}
    assert often.model_dump()["importance"]["save_every_samples"] == 1


@pytest.mark.parametrize(
    ("settings", "needed"),
    [({}, True), ({"scores": "random"}, False), ({"scores": "magnitude"}, False), ({"scores_file": "x.safetensors"}, False)],
)
def test_pruning_needs_an_importance_pass_of_this_run_only_for_its_scores(settings: dict[str, str], needed: bool) -> None:
    recipe = recipe_of().model_copy(update={"prune": Prune(target=Target(ffn=8), **settings)})  # type: ignore[arg-type]
    assert stage_inputs(STAGES["prune"], recipe) == (("import", "importance") if needed else ("import",))
    assert "importance" in stage_inputs(STAGES["report"], recipe)


@pytest.mark.parametrize(("stage", "same"), [("prune", True), ("importance", False)])
def test_pruned_weights_do_not_depend_on_the_precision_of_what_is_computed(stage: str, same: bool) -> None:
    """Neither the machine's choice of precision nor the layout makes another pruned checkpoint."""
    parallel = Parallel(data=4, timeout_seconds=5)
    ids = {stage_id(STAGES[stage], recipe_of().model_copy(update={"precision": p, "parallel": parallel}), {}) for p in ("fp32", "bf16")}
    assert (len(ids) == 1) == same
    assert stage_id(STAGES[stage], recipe_of().model_copy(update={"precision": "fp32"}), {}) in ids


def distilled(**changes: object) -> Recipe:
    recipe = recipe_of()
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update=changes)})


@pytest.mark.parametrize("change", [{"global_batch": 8}, {"steps": 9}, {"micro_batch": 2}, {"validate_every_steps": 3}, {"loss_memory_mib": 9}])
def test_what_may_change_between_two_starts_is_the_same_run_under_another_id(change: dict[str, object]) -> None:
    stage, before, after = STAGES["distill"], distilled(), distilled(**change)
    assert run_id(stage, before, {}) == run_id(stage, after, {})
    assert stage_id(stage, before, {}) != stage_id(stage, after, {})


@pytest.mark.parametrize("change", [{"save_every_steps": 7}, {"keep_checkpoints": 5}])
def test_what_has_no_effect_on_the_result_leaves_a_finished_stage_finished(change: dict[str, object]) -> None:
    stage = STAGES["distill"]
    assert stage_id(stage, distilled(), {}) == stage_id(stage, distilled(**change), {})
    refuse_foreign_inputs({"distill": artifact("distill", distilled(), "d1")}, distilled(**change), "r.yaml")


@pytest.mark.parametrize("change", [{"seed": 1}, {"sequence_length": 16}, {"temperature": 2.0}, {"clip_gradient_norm": 0.5}])
def test_everything_else_is_another_run(change: dict[str, object]) -> None:
    assert run_id(STAGES["distill"], distilled(), {}) != run_id(STAGES["distill"], distilled(**change), {})


def test_fields_that_the_table_names_exist() -> None:
    for stage in STAGES.values():
        for field in (*stage.continues, *stage.spares):
            section, name = field.split(".")
            assert section in stage.sections
            assert name in stage_fields(section), field


def stage_fields(section: str) -> set[str]:
    """A section that a recipe may lack is one of a union."""
    annotation = Recipe.model_fields[section].annotation
    kinds = [annotation, *get_args(annotation)]  # a section that a recipe need not have is one or None
    return {name for kind in kinds for name in getattr(kind, "model_fields", {})}


@pytest.mark.parametrize(
    ("models", "read"),
    [("all", {"prune", "distill"}), (["pruned", "teacher"], {"prune"}), (["teacher", "distilled"], {"prune", "distill"})],
)
def test_evaluation_reads_only_the_models_that_it_is_asked_for(models: object, read: set[str]) -> None:
    recipe = recipe_of().model_copy(update={"evaluate": Evaluate.model_validate({"models": models})})
    assert set(stage_inputs(STAGES["evaluate"], recipe)) == {"import", "data"} | read
    assert recipe.evaluate.names[0] == "teacher"  # what the others are compared with, in whatever order it was written


@pytest.mark.parametrize("models", ["pruned", ["teacher"], ["pruned", "distilled"], ["teacher", "purned"], []])
def test_models_to_evaluate_are_the_teacher_and_another(models: object) -> None:
    with pytest.raises(ValidationError, match="input should be all, or a list of teacher and others"):
        Evaluate.model_validate({"models": models})
