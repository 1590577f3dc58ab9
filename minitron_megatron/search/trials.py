"""Candidates on disk: each is a small run below candidates/ with the search's own inputs, and continues by itself where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from minitron_megatron.artifact import Artifact, find_artifact, partial_folder
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.search import Search
from minitron_megatron.config.trial import trial_recipe
from minitron_megatron.search.jobs import Job
from minitron_megatron.search.space import cut_sizes
from minitron_megatron.search.survey import Candidate

Losses = dict[int, dict[str, NDArray[np.float64]]]
"""Step → kind of loss → [W] of each held-out window."""
WINDOWS = "validation.jsonl"
"""What a distillation leaves: a line per validation with the loss of each window."""
WEIGHTS = ("prune", "distill")


@dataclass(frozen=True)
class Trial:
    """A candidate of the shortlist and its folder."""

    candidate: Candidate
    folder: Path

    @property
    def name(self) -> str:
        return self.candidate.name

    def losses(self) -> Losses:
        """Of the steps at which it was validated, as last collected."""
        told = {step: json.loads(line) for step, line in _by_step(self.folder / WINDOWS).items()}
        return {step: {name: np.array(values) for name, values in fields.items() if name != "step"} for step, fields in told.items()}

    def has(self, step: int) -> bool:
        return step in self.losses()

    def jobs(self) -> list[Job]:
        """What is still to be done to come to the step that its recipe says."""
        recipe, log = self.folder / "recipe.yaml", self.folder / "log.txt"
        pruned = find_artifact(self.folder, "prune") is not None
        return [*([] if pruned else [Job("prune", recipe, log)]), Job("distill", recipe, log)]

    def collect(self) -> None:
        """Keeps the losses beside the runs, so that the weights can go; also those of a run whose weights are gone, and which began anew."""
        places = [self.folder / "distill" / WINDOWS, partial_folder(self.folder, "distill") / WINDOWS]
        lines = _by_step(self.folder / WINDOWS) | _by_step(next(path for path in places if path.is_file()))
        copy = self.folder / f"{WINDOWS}.tmp"
        copy.write_text("".join(f"{lines[step]}\n" for step in sorted(lines)))
        copy.replace(self.folder / WINDOWS)

    def clear(self) -> None:
        """Leaves what it was told and what it said."""
        for stage in WEIGHTS:
            for path in (self.folder / stage, partial_folder(self.folder, stage)):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.iterdir():
            if path.is_symlink():
                path.unlink()


def _by_step(file: Path) -> dict[int, str]:
    """Lines as they were written; none of a file that is not there."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {json.loads(line)["step"]: line for line in lines}


def make_trials(candidates: Sequence[Candidate], inputs: Mapping[str, Artifact], folder: Path) -> list[Trial]:
    """A folder for each with the inputs as links; one that is there already keeps what it holds."""
    trials = [Trial(candidate, folder / candidate.name) for candidate in candidates]
    for trial in trials:
        trial.folder.mkdir(parents=True, exist_ok=True)
        for name, artifact in inputs.items():
            if not (trial.folder / name).is_symlink():
                # relative: the search's folder is renamed when it is published, and a run folder may move
                (trial.folder / name).symlink_to(os.path.relpath(artifact.path.resolve(), trial.folder.resolve()))
    return trials


def write_recipe(trial: Trial, recipe: Recipe, search: Search, step: int) -> None:
    """The candidate's recipe, which ends its distillation at the step."""
    last = search.short_distillation.rounds[-1]
    sizes = cut_sizes(trial.candidate.arch, trial.candidate.source)
    own = trial_recipe(recipe, search, sizes, name=trial.name, runs=str(trial.folder.parent))
    own = own.model_copy(update={"distill": own.distill.model_copy(update={"pause_after_steps": step if step < last else None})})
    values = own.model_dump(mode="json", exclude_none=True)
    (trial.folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
