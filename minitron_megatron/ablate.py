"""`minitron ablate`: every variant of an ablation as a run of its own, and one table of what they end at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_megatron.artifact import open_artifact
from minitron_megatron.chain import run_folder
from minitron_megatron.conductor import needed_for, run_stages
from minitron_megatron.config.ablation import Plan, Trial
from minitron_megatron.results.ablation import Run, publish_ablation


def run_trials(plan: Plan) -> int:
    """Runs what `evaluate` of each trial takes, and nothing that a sibling or the recipe's own run has; stops at the first that fails."""
    for number, trial in enumerate(plan.trials, 1):
        named = trial.variant if trial.seed is None else f"{trial.variant}, seed {trial.seed}"
        print(f"{plan.name} {number}/{len(plan.trials)}: {named}", flush=True)
        own = _folders(trial)
        code = _run(trial, [folder for folder in _lenders(plan) if folder not in own])
        if code:
            return code
    return 0


def collect(plan: Plan) -> dict[str, Any]:
    """The result of all trials, published in the ablation's folder."""
    runs: dict[str, list[Run]] = {}
    for trial in plan.trials:
        evaluated = open_artifact(run_folder(trial.last.recipe), "evaluate", trial.recipe)
        runs.setdefault(trial.variant, []).append((trial.seed, evaluated.result))
    return publish_ablation(plan.name, runs, plan.folder)


def _run(trial: Trial, lenders: Sequence[Path]) -> int:
    for step, _, _ in trial.steps:
        wanted = "evaluate" if step is trial.last else "export" if step.trained else "prune"
        code = run_stages(needed_for(wanted, step.recipe), trial.recipe, [*trial.overrides, *step.overrides], lenders)
        if code:
            return code
    return 0


def _lenders(plan: Plan) -> list[Path]:
    return [*plan.lenders, *(folder for trial in plan.trials for folder in _folders(trial))]


def _folders(trial: Trial) -> list[Path]:
    return [run_folder(step.recipe) for step, _, _ in trial.steps]
