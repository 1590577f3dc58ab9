"""An ablation: one recipe, and variants of it that differ in a few keys, each with several seeds where chance has a part.

    name: losses
    recipe: ../smollm2_135m_to_97m.yaml    # relative to this file
    overrides: [distill.steps=60]          # for all variants
    seeds: [1, 2]
    seed_keys: [distill.seed]
    variants:
      - {name: forward_kl, overrides: [distill.loss=forward_kl]}
      - {name: cross_entropy, overrides: [distill.loss=cross_entropy]}

Above all of it stands `key=value` of the command line; `name=` and `seeds=` there are the ablation's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.family import STEP, Step, checked_steps, picked_steps
from minitron_megatron.config.load import merged, recipe_file, validated_as
from minitron_megatron.config.section import Section
from minitron_megatron.errors import RecipeError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
OWN_KEYS = ("name=", "seeds=")


class Variant(Section):
    name: str = Field(pattern=NAME, description="folder below the ablation's")
    overrides: list[str] = Field([], description="key=value of this variant")
    recipe: str | None = Field(None, description="another file than the ablation's; of a family the last step counts")
    seeds: list[int] | None = Field(None, description="in place of the ablation's; []: chance has no part in this variant")

    @field_validator("overrides", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        return _as_texts(value)


class Ablation(Section):
    """What a file says."""

    name: str = Field(pattern=NAME, description="folder below the recipe's runs")
    recipe: str = Field(description="the recipe that is varied; relative to the ablation's file")
    overrides: list[str] = Field([], description="key=value of all variants")
    seeds: list[int] = Field([], description="each variant is run with each")
    seed_keys: list[str] = Field([], description="keys of the recipe that take the seed, such as distill.seed")
    variants: list[Variant] = Field(min_length=1)

    @field_validator("overrides", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        return _as_texts(value)

    def seeds_of(self, variant: Variant) -> list[int]:
        return self.seeds if variant.seeds is None else variant.seeds


@dataclass(frozen=True)
class Trial:
    """One variant with one seed: a run of its own, or the runs of a family's steps."""

    variant: str
    seed: int | None
    recipe: str
    overrides: list[str]
    steps: list[tuple[Step, Architecture, Architecture]]
    """With source and target."""

    @property
    def last(self) -> Step:
        return self.steps[-1][0]


@dataclass(frozen=True)
class Plan:
    """Everything that an ablation runs, checked."""

    name: str
    folder: Path
    trials: list[Trial]
    lenders: list[Path]
    """Runs of the recipes themselves, which may have what the trials need."""


def planned(path: str | Path, overrides: list[str] | None = None) -> Plan:
    """All trials of a file; raises RecipeError with the mistakes of every variant, one line each, before any is run."""
    given = overrides or []
    rest = [item for item in given if not item.startswith(OWN_KEYS)]
    ablation = validated_as(Ablation, path, merged(path, recipe_file(path), [item for item in given if item.startswith(OWN_KEYS)]))
    problems = _own_problems(ablation, given)
    if problems:
        raise RecipeError([f"{path}: {problem}" for problem in problems])
    files = _files(path, ablation)
    places = {name: _place(file, [*ablation.overrides, *rest]) for name, file in files.items()}
    folder = Path(places[ablation.recipe][0]) / ablation.name
    if any(Path(runs) / name == folder for runs, name in places.values()):
        raise RecipeError(f"{path}: name={ablation.name} is the recipe's own, whose run lies there; give the ablation another")
    trials = _trials(ablation, files, rest, folder)
    return Plan(ablation.name, folder, trials, [run for name in files for run in _runs_of(files[name], *places[name])])


def _files(path: str | Path, ablation: Ablation) -> dict[str, str]:
    """Recipes as they are named in the file → where they are."""
    names = dict.fromkeys([ablation.recipe, *(variant.recipe for variant in ablation.variants)])
    files = {name: os.path.normpath(Path(path).parent / name) for name in names if name}
    missing = [
        f"{path}: recipe={name}: no such file ({file}); it is looked for beside the ablation"
        for name, file in files.items()
        if not Path(file).is_file()
    ]
    if missing:
        raise RecipeError(missing)
    return files


def _trials(ablation: Ablation, files: dict[str, str], above: list[str], folder: Path) -> list[Trial]:
    trials: list[Trial] = []
    problems: dict[str, list[str]] = {}
    for variant in ablation.variants:
        file = files[variant.recipe or ablation.recipe]
        seeds: list[int | None] = [*ablation.seeds_of(variant)]
        for seed in seeds or [None]:
            seeded = [] if seed is None else [f"{key}={seed}" for key in ablation.seed_keys]
            place = [f"runs={folder}", f"name={variant.name if seed is None else f'{variant.name}-seed{seed}'}"]
            own = [*ablation.overrides, *variant.overrides, *above, *seeded, *place]
            try:
                trials.append(Trial(variant.name, seed, file, own, _all_checked(picked_steps(file, own))))
            except RecipeError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(variant.name)
    if problems:
        raise RecipeError([f"{_whose(names, ablation)}: {problem}" for problem, names in problems.items()])
    return trials


def _all_checked(steps: list[Step]) -> list[tuple[Step, Architecture, Architecture]]:
    checked = checked_steps(steps)
    if len(checked) < len(steps):
        behind = steps[len(checked)].name
        raise RecipeError(f"step {behind} goes on from a search, so that its variants would differ in their source; name sizes in prune.target")
    if any(step.recipe.correct_beside for step in steps):
        raise RecipeError(
            "correct.beside=true: nothing corrects beside the runs of an ablation, and the uncorrected source would teach; set correct.beside=false"
        )
    return checked


def _whose(names: list[str], ablation: Ablation) -> str:
    """A mistake that all have is told once."""
    having = list(dict.fromkeys(names))
    if len(having) == len(ablation.variants):
        return "every variant"
    return f"variant{'s' if len(having) > 1 else ''} {', '.join(having)}"


def _own_problems(ablation: Ablation, overrides: list[str]) -> list[str]:
    names = [variant.name for variant in ablation.variants]
    problems = [f"variants: two are called {name}; give each its own name" for name in sorted({name for name in names if names.count(name) > 1})]
    seeded = any(ablation.seeds_of(variant) for variant in ablation.variants)
    if seeded and not ablation.seed_keys:
        problems.append("seeds, but no seed_keys; name the keys that take them, such as seed_keys: [distill.seed]")
    if ablation.seed_keys and not seeded:
        problems.append(f"seed_keys: {', '.join(ablation.seed_keys)}, but no seeds; give them, such as seeds: [1, 2, 3]")
    for variant in ablation.variants:
        seeds = ablation.seeds_of(variant)
        if len(set(seeds)) < len(seeds):
            problems.append(f"variant {variant.name}: a seed is there twice in {seeds}")
        taken = {name for name in names if name.startswith(f"{variant.name}-seed")}
        problems += [f"variants: {name} is the folder of {variant.name} with a seed; give it another name" for name in sorted(taken) if seeds]
        items = [*ablation.overrides, *variant.overrides, *overrides]
        given = [item for item in items if seeds and item.partition("=")[0] in ablation.seed_keys]
        problems += [f"{item}: variant {variant.name} takes its seeds {seeds} there; give them as seeds=[…]" for item in given]
    every = [*ablation.overrides, *overrides, *(item for variant in ablation.variants for item in variant.overrides)]
    problems += [f"{item}: an ablation takes whole families; leave it out" for item in every if item.startswith(STEP)]
    of_variants = [item for variant in ablation.variants for item in variant.overrides if item.startswith(("name=", "runs="))]
    problems += [f"{item}: a variant's run lies in the ablation's folder, under the variant's own name; leave it out" for item in of_variants]
    return problems


def _place(file: str, overrides: list[str]) -> tuple[str, str]:
    """Folder of runs and name of a recipe's own run."""
    values = merged(file, recipe_file(file), [item for item in overrides if item.startswith("runs=")])
    return str(values.get("runs", "runs")), str(values.get("name"))


def _runs_of(file: str, runs: str, name: str) -> list[Path]:
    """The folder of an ordinary recipe's run, or those of a family's steps."""
    family = recipe_file(file).get("family")
    return [Path(runs) / name] if not family else [Path(runs) / name / str(step.name) for step in family]


def _as_texts(value: object) -> object:
    """YAML reads `[prune.target.layers=26]` as texts, and `- key: value` as a mapping: that is a mistake of one colon."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        raise ValueError("input should be texts of the form key=value; put quotes around one that holds a colon")
    return value
