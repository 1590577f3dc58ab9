"""The stage that imports further teachers: each one's weights whole, in the recipe's order, and none with another tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.schema import Recipe
from minitron_megatron.convert import import_stage, teachers_stage
from minitron_megatron.errors import DataError
from minitron_megatron.training.given import first_teacher, given_teachers


def recipe(source: Path, *models: dict[str, Any]) -> Recipe:
    values = {"name": "tiny", "model": {"path": str(source)}, "data": {"train": ["x"]}, "prune": {"target": {}}, "distill": {"steps": 100}}
    return Recipe.model_validate({**values, "teachers": {"models": list(models)}})


@pytest.fixture
def source(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_hf_model("llama"), tmp_path / "source"))


@pytest.fixture
def other(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_hf_model("qwen3"), tmp_path / "other"))


@pytest.fixture
def imported(source: Path, tmp_path: Path) -> Artifact:
    folder = tmp_path / "import"
    folder.mkdir()
    write_json(folder / "result.json", import_stage.run(recipe(source, {"path": "source"}), {}, folder))
    return Artifact(folder, {"id": "x"})


def run(recipe_of_all: Recipe, imported: Artifact, folder: Path) -> Artifact:
    folder.mkdir()
    write_json(folder / "result.json", teachers_stage.run(recipe_of_all, {"import": imported}, folder))
    return Artifact(folder, {"id": "t"})


def test_teachers_come_in_the_recipes_order_with_their_own_weights(source: Path, other: Path, imported: Artifact, tmp_path: Path) -> None:
    wanted = recipe(source, {"path": str(other), "weight": 2}, {"path": "source", "weight": 3}, {"path": str(source)})
    artifact = run(wanted, imported, tmp_path / "teachers")
    inputs = {"import": imported, "teachers": artifact}
    given = given_teachers(wanted, inputs, imported.path / "checkpoint")
    assert [(teacher.weight, teacher.is_source, teacher.architecture.family_name) for teacher in given] == [
        (2, False, "qwen3"),
        (3, True, "llama"),
        (1, False, "llama"),
    ]
    for teacher, folder in zip(given, (other, source, source), strict=True):
        original = HuggingFaceSource(folder, teacher.architecture)
        ours = MegatronSource(teacher.checkpoint, teacher.architecture)
        assert all(torch.equal(original.read(row), ours.read(row)) for row in tensor_table(teacher.architecture))


def test_a_teacher_with_another_tokenizer_is_refused(source: Path, other: Path, imported: Artifact, tmp_path: Path) -> None:
    """As many entries in another order."""
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    turned = {letter: number for number, letter in enumerate(sorted(vocabulary, key=vocabulary.get, reverse=True))}
    file.write_text(json.dumps({**tokenizer, "model": {**tokenizer["model"], "vocab": turned}}))
    with pytest.raises(DataError, match="this teacher's tokenizer gives other ids than the source's"):
        run(recipe(source, {"path": str(other)}), imported, tmp_path / "teachers")


def test_outside_files_are_those_of_every_teacher_but_the_source(source: Path, other: Path) -> None:
    assert set(teachers_stage.outside_files(recipe(source, {"path": "source"}, {"path": str(other)}))) == set(other.iterdir())
    assert teachers_stage.outside_files(recipe(source, {"path": "source"})) == []


def test_the_teacher_that_is_compared_is_the_corrected_one_and_of_several_the_first(
    source: Path, other: Path, imported: Artifact, tmp_path: Path
) -> None:
    distilled, corrected = tmp_path / "distill", Artifact(tmp_path / "correct", {"id": "c"})
    distilled.mkdir()
    write_json(distilled / "result.json", {})
    inputs = {"import": imported, "distill": Artifact(distilled, {"id": "d"}), "correct": corrected}
    alone = recipe(source, {"path": "source"}).model_copy(update={"teachers": None})
    arch = Architecture.from_dict(imported.result["architecture"])
    assert first_teacher(alone, inputs) == (arch, corrected.path / "checkpoint")
    wanted = recipe(source, {"path": str(other)}, {"path": "source"})
    inputs["teachers"] = run(wanted, imported, tmp_path / "teachers")
    assert first_teacher(wanted, inputs)[0].family_name == "qwen3"
