"""`minitron settings` names what recipes are checked against, and nothing else."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from minitron_megatron.cli import app
from minitron_megatron.config.fp8 import Fp8
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError
from minitron_megatron.settings import Setting, settings_of

SECTIONS = [setting.key for setting in settings_of() if setting.values == "section"]


def test_a_section_is_listed_with_its_values_and_defaults_as_yaml_writes_them() -> None:
    listed = {setting.key: setting for setting in settings_of("fp8")}
    assert list(listed) == [f"fp8.{name}" for name in Fp8.model_fields]
    assert listed["fp8.format"][:3] == ("fp8.format", "hybrid, e4m3", "hybrid")
    assert listed["fp8.emulated"][1:3] == ("true, false", "false")
    assert listed["fp8.amax_history"].default == "1024" and "delayed scaling looks back" in listed["fp8.amax_history"].meaning


def test_sections_in_a_section_a_list_and_a_mapping_have_their_keys_below_them() -> None:
    keys = {setting.key for name in ("distill", "teachers", "parallel") for setting in settings_of(name)}
    assert {
        "distill.adam.beta1",
        "distill.loss.NAME.from",
        "distill.hidden.pairs",
        "teachers.models.NUMBER.weight",
        "parallel.teacher.tensor",
    } <= keys
    required = {setting.key for name in SECTIONS for setting in settings_of(name) if setting.default == "required"}
    assert {"distill.steps", "model.path", "data.train"} <= required


def test_the_top_level_has_every_key_of_a_recipe_and_every_section_can_be_listed() -> None:
    assert [setting.key for setting in settings_of()] == list(Recipe.model_fields)
    assert len(SECTIONS) > 15
    for name in SECTIONS:
        assert all(isinstance(setting, Setting) and "typing." not in setting.values for setting in settings_of(name))


@pytest.mark.parametrize("name", ["fp9", "precision"])
def test_what_is_no_section_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(RecipeError, match=f"no section '{name}'; its sections: model, data"):
        settings_of(name)


def test_the_verb_prints_a_table() -> None:
    ran = CliRunner().invoke(app, ["settings", "export"])
    assert ran.exit_code == 0 and "export.format" in ran.output
