"""`minitron plan`: from a recipe alone, before anything has run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]


def test_every_pipeline_is_a_row_and_the_picture_is_written(project: Any, minitron: Run) -> None:
    picture = Path("schedule.svg")
    ran = minitron("plan", project.recipe, "--schedule", picture, "parallel.pipeline=2", "distill.global_batch=8", "distill.micro_batch=1")
    assert ran.code == 0 and "2 (recipe)" in ran.out and "8 micro-batches" in ran.out
    assert picture.read_text().startswith("<?xml") and "2 ranks, 4 micro-batches" in ran.out
    assert project.written() == {"schedule.svg"}


def test_a_picture_that_cannot_be_written_is_one_line(project: Any, minitron: Run) -> None:
    ran = minitron("plan", project.recipe, "--schedule", "missing/schedule.svg", "distill.global_batch=8")
    assert ran.code == 2 and ran.err.count("\n") == 1 and "missing: no such folder" in ran.err


def test_the_picture_splits_the_layers_as_the_recipe_lists_them(project: Any, minitron: Run) -> None:
    pictures = []
    for rule in ("[1,2]", "[2,1]"):
        ran = minitron("plan", project.recipe, "--schedule", "schedule.svg", "parallel.pipeline=2", f"parallel.layers_per_stage={rule}")
        assert ran.code == 0, ran.err
        pictures.append(Path("schedule.svg").read_text())
    assert pictures[0] != pictures[1]


def test_every_stage_has_its_memory_and_its_time(project: Any, minitron: Run, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = minitron("plan", project.recipe, "precision=bf16", "platform=auto", "--gpu", "A100-80GB")
    assert ran.code == 0, ran.err
    for told in ("1 × A100-80GB", "distill", "evaluate", "GiB a rank", "optimizer", "fullest moment", "tokens a second and GPU"):
        assert told in ran.out
    assert project.written() == set()


def test_a_cluster_file_that_is_none_is_one_line(project: Any, minitron: Run) -> None:
    ran = minitron("plan", project.recipe, "cluster=nowhere.yaml")
    assert ran.code == 2 and ran.err.count("\n") == 1 and "nowhere.yaml: no such cluster file" in ran.err
    ran = minitron("plan", project.recipe, "--gpu", "H300")
    assert ran.code == 2 and "--gpu: 'H300' is not known" in ran.err


def test_layouts_need_a_gpu(project: Any, minitron: Run) -> None:
    ran = minitron("plan", project.recipe, "--layouts")
    assert ran.code == 2 and "--layouts needs a GPU and bf16" in ran.err
