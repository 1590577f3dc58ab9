"""A user's mistake: exit code 2, one line on stderr, no traceback, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]
VERBS = ("import", "data", "importance", "prune", "distill", "evaluate", "export", "report", "run", "show")


def assert_one_line(ran: Any, expected: str, project: Any) -> None:
    assert ran.code == 2, ran
    assert "Traceback" not in ran.err and "Traceback" not in ran.out
    assert len(ran.err.splitlines()) == 1, ran.err
    assert expected in ran.err
    assert project.written() == set()


def edit_config(project: Any, **fields: Any) -> None:
    file = project.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


MISTAKES = {
    "an unknown key": (["distill.stpes=3"], "recipe.yaml: distill.stpes: unknown key 'stpes'; did you mean 'steps'?"),
    "an unknown section": (["distil.steps=3"], "unknown section 'distil'; did you mean 'distill'?"),
    "a wrong type": (["distill.steps=many"], "recipe.yaml: distill.steps: input should be a valid integer"),
    "a target larger than the source": (["prune.target.ffn=29"], "prune.target.ffn=29 is larger than the source's 28"),
    "an override without a value": (["distill.steps"], "is not of the form key=value"),
    "a model that is not there": (["model.path=nowhere"], "nowhere/config.json: not found"),
    "scores of two kinds": (["prune.scores_file=x", "prune.scores=random"], "prune.scores_file holds activation scores, but prune.scores=random"),
    "a teacher that would learn": (["fp8.teacher=delayed"], "fp8.teacher: delayed scaling learns its scales from the steps of a training"),
    "layers out of FP8 under delayed scaling": (
        ["fp8.student=delayed", "fp8.first_last_layers_bf16=true", "fp8.emulated=true"],
        "fp8.first_last_layers_bf16=true: with delayed scaling megatron enters FP8 once for all layers",
    ),
    "a layout that does not divide": (["parallel.tensor=2", "prune.target.ffn=15"], "parallel.tensor=2 does not divide the pruned model's 15 ffn"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("verb", ["show", "run", "distill"])
def test_mistakes_in_a_recipe_are_told_before_anything_starts(verb: str, mistake: str, project: Any, minitron: Run) -> None:
    overrides, expected = MISTAKES[mistake]
    assert_one_line(minitron(verb, project.recipe, *overrides), expected, project)


def test_fp8_without_a_gpu_is_told_before_anything_starts(project: Any, minitron: Run) -> None:
    """Not after the hours before the first stage that trains; sizes are in order here."""
    edit_config(project, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=64)
    overrides = ["fp8.student=tensorwise", "prune.target.ffn=32", "platform=auto", "precision=auto"]
    assert_one_line(
        minitron("run", project.recipe, *overrides), "this process runs on a CPU, which multiplies in no FP8; set fp8.emulated=true", project
    )


FILES = {
    "a task of the last stage": (["evaluate.tasks=[nowhere.yaml]"], "nowhere.yaml: no such task file"),
    "a task that layers are chosen by": (
        ["prune.target.layers=1", "depth.criterion=task", "depth.tasks=[nowhere.yaml]", "depth.sequence_length=32"],
        "nowhere.yaml: no such task file",
    ),
    "scores": (["prune.scores_file=nowhere"], "prune.scores_file=nowhere: no such file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_a_later_stage_would_miss_is_told_before_the_first_one_starts(kind: str, project: Any, minitron: Run) -> None:
    overrides, expected = FILES[kind]
    assert_one_line(minitron("run", project.recipe, *overrides), expected, project)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_recipe_that_is_not_there(verb: str, project: Any, minitron: Run) -> None:
    assert_one_line(minitron(verb, "nowhere.yaml"), "nowhere.yaml: no such recipe", project)


@pytest.mark.parametrize("verb", ["show", "import"])
def test_an_unknown_family_is_refused_with_the_list(verb: str, project: Any, minitron: Run) -> None:
    edit_config(project, model_type="gpt_neox")
    assert_one_line(
        minitron(verb, project.recipe),
        "unknown model family 'gpt_neox'; known families: llama, mistral, mixtral, nemotron, qwen2, qwen3, qwen3_moe",
        project,
    )


def test_several_mistakes_are_one_line_each(project: Any, minitron: Run) -> None:
    ran = minitron("run", project.recipe, "prune.target.ffn=29", "distill.sequence_length=5000", "distill.micro_batch=3")
    assert (ran.code, len(ran.err.splitlines()), project.written()) == (2, 3, set())


def test_missing_input_names_the_command_that_makes_it(project: Any, worker: Run) -> None:
    assert_one_line(worker("prune", project.recipe), "runs/tiny/import does not exist; make it with: minitron import recipe.yaml", project)


def test_prune_needs_no_gpu_whatever_the_recipe_computes_on(project: Any, worker: Run) -> None:
    """On a machine without one it gets as far as its missing input, where a stage that builds a model is refused."""
    assert_one_line(worker("prune", project.recipe, "platform=cuda"), "runs/tiny/import does not exist", project)


def break_missing_shard(project: Any) -> None:
    tensors = load_file(project.model / "model.safetensors")
    (project.model / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, project.model / first)
    weight_map = {name: first if name in names[:5] else second for name in names}
    (project.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def break_truncated(project: Any) -> None:
    file = project.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def break_vocabulary(project: Any) -> None:
    edit_config(project, vocab_size=128)


BROKEN = {
    "a missing shard": (break_missing_shard, "names model-00002-of-00002.safetensors, which is missing; copy the model anew"),
    "a truncated shard": (break_truncated, "model.safetensors: not a whole safetensors file"),
    "a wrong vocabulary size": (break_vocabulary, "has shape [131, 40], but config.json means [128, 40]; vocab_size is wrong"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_refused_by_the_import(kind: str, project: Any, worker: Run) -> None:
    damage, expected = BROKEN[kind]
    damage(project)
    assert_one_line(worker("import", project.recipe), expected, project)


def test_a_full_disk_is_told_before_the_import_writes(project: Any, worker: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    assert_one_line(worker("import", project.recipe, "runs=deep/er"), "no disk space for the imported checkpoint", project)


def test_a_full_disk_leaves_what_earlier_stages_made(project: Any, worker: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker("import", project.recipe).code == 0
    before = sorted(str(path) for path in (project.folder / "runs").rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    (project.folder / "model" / "new").write_text("")  # the source changed: the import is due again
    ran = worker("import", project.recipe)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert sorted(str(path) for path in (project.folder / "runs").rglob("*")) == before


def test_an_error_of_ours_is_a_traceback_and_exit_code_1(project: Any, worker: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a user's mistake is told in one line: a defect must not hide behind it."""
    from minitron_megatron.convert import import_stage

    monkeypatch.setattr(import_stage, "write_torch_dist", lambda *_, **__: 1 / 0)
    ran = worker("import", project.recipe)
    assert ran.code == 1
    assert "Traceback" in ran.err and "ZeroDivisionError" in ran.err


def test_a_stage_of_one_process_refuses_several(project: Any, worker: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_line(worker("import", project.recipe), "stage import is one process, but 2 were started; start it with: minitron import", project)


def test_an_unknown_stage_is_refused_with_the_list(project: Any, worker: Run) -> None:
    assert_one_line(worker("distil", project.recipe), "unknown stage 'distil'; stages: import, data", project)


def test_as_a_user_sees_it_through_the_launcher(project: Any, command: Run) -> None:
    """Real processes: the worker's message passes through the launcher once, and its exit code too."""
    break_missing_shard(project)
    assert_one_line(command("import", project.recipe), "which is missing; copy the model anew", project)


def test_as_a_user_sees_it_before_any_process_starts(project: Any, command: Run) -> None:
    assert_one_line(command("run", project.recipe, "distil.lr=1e-4"), "did you mean 'distill'?", project)


def test_a_finished_stage_is_up_to_date_until_its_source_changes(project: Any, command: Run, minitron: Run, worker: Run) -> None:
    ran = command("import", project.recipe)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("import: llama, ")
    assert "up to date" in minitron("import", project.recipe).out
    assert "up to date" in worker("import", project.recipe, "distill.steps=77").out  # another section's setting
    edit_config(project, rope_theta=20000.0)
    again = worker("import", project.recipe)
    assert again.code == 0 and "up to date" not in again.out
