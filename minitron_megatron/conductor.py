"""Runs stages one after another, each in processes of its own: a chain, the steps of a family, the variants of an ablation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from minitron_megatron.artifact import Artifact, find_artifact, open_artifact
from minitron_megatron.chain import (
    STAGES,
    Stage,
    covers,
    finished,
    is_asked,
    outside_files,
    require_asked,
    run_folder,
    stage_id,
    stage_inputs,
    stages_of,
)
from minitron_megatron.config.family import Step, checked_steps
from minitron_megatron.config.schema import Recipe
from minitron_megatron.launcher import launch
from minitron_megatron.worker import prepare


def run_stages(names: Iterable[str], recipe_path: str, overrides: list[str], shared: Sequence[Path] = ()) -> int:
    """Starts each stage that is not up to date; stops at the first that fails and returns its exit code.

    shared: folders of other runs, whose artifacts are taken where they are what this run would make.
    """
    wanted = list(names)
    recipe, _ = prepare(recipe_path, overrides, needs_device=any(STAGES[name].computes for name in wanted))
    for name in wanted:
        require_asked(STAGES[name], recipe, recipe_path)
        outside_files(STAGES[name], recipe)  # a task file that is not there is told ahead of the hours before its stage
    for name in wanted:
        stage = STAGES[name]
        artifact = finished(stage, recipe)
        if artifact:
            print(f"{name}: up to date ({artifact.path})", flush=True)
            continue
        taken = adopt(stage, recipe, shared)
        if taken:
            print(f"{name}: the same as {taken.path}", flush=True)
            continue
        code = launch(name, recipe_path, overrides, recipe.parallel.processes if stage.distributed else 1)
        if code:
            return code
    return 0


def run_steps(steps: list[Step], recipe_path: str, overrides: list[str]) -> int:
    """The chain of each step; of one that the next goes on from untrained, only what the pruned model takes."""
    checked_steps(steps)
    for step in steps:
        if step.name:
            print(f"step {step.name}:", flush=True)
        names = [stage.name for stage in stages_of(step.recipe)] if step.trained else needed_for("prune", step.recipe)
        code = run_stages(names, recipe_path, [*overrides, *step.overrides])
        if code:
            return code
    return 0


def needed_for(name: str, recipe: Recipe) -> list[str]:
    """The stage and all that it reads, in the chain's order."""
    wanted, found = [name], set()
    while wanted:
        stage = wanted.pop()
        if stage not in found and is_asked(STAGES[stage], recipe):
            found.add(stage)
            wanted += stage_inputs(STAGES[stage], recipe)
    return [stage for stage in STAGES if stage in found]


def adopt(stage: Stage, recipe: Recipe, shared: Sequence[Path]) -> Artifact | None:
    """Links another run's artifact into this one where its id is the one that this run's would have; returns the other."""
    folder = run_folder(recipe)
    inputs = {name: find_artifact(folder, name) for name in stage_inputs(stage, recipe)}
    known = {name: artifact for name, artifact in inputs.items() if artifact is not None}
    if len(known) < len(inputs):
        return None
    identity = stage_id(stage, recipe, known)
    for other in shared:
        artifact = find_artifact(other, stage.name)
        if artifact and artifact.id == identity and covers(stage, recipe, artifact):
            _link(artifact.path, folder / stage.name)
            return open_artifact(other, stage.name)
    return None


def _link(source: Path, target: Path) -> None:
    """Hard links: files of an artifact never change, and either run may be removed. A start that is killed leaves no half of it."""
    partial = target.with_name(f".{target.name}.adopted")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    partial.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)
