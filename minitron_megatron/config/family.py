"""A family: one recipe file whose steps become ordinary recipes, each compressing what a step before it left (P1 section 4.3, best practice 1).

    family:
      - {name: 8b, prune: {target: {hidden: 4096, ffn: 16384}}}
      - {name: 4b, prune: {target: {hidden: 3072, heads: 24, ffn: 9216}}, teacher: original}

A step's own keys stand above the file's, and `key=value` overrides above both. The same form is the teacher assistant: a small model pruned
from the original (`source: original`) and taught by the middle one (`teacher: previous`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.load import merged, recipe_file, told_as_one_line, validated
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArchitectureError, RecipeError

Source = Literal["previous", "pruned", "original"]
"""What a step prunes: the model that the step before exported, that one as it was pruned (not yet trained), or the family's own."""
Teacher = Literal["source", "previous", "original"]
OWN_KEYS = ("name", "source", "teacher")
FAMILY = "family="
"""Start of the override that makes a family of an ordinary recipe, as in `minitron run recipe.yaml 'family=[{name: 8b, prune: …}, …]'`."""
STEP = "step="
"""Start of the override that names a step of a family, as in `minitron distill family.yaml step=4b`."""


@dataclass(frozen=True)
class Step:
    """One recipe of a file, and where its model comes from; an ordinary file is one step without a name."""

    recipe: Recipe
    name: str = ""
    source: Source = "original"
    before: str = ""
    """The step before it."""
    trained: bool = True
    """Whether its training is asked for: not where the next step goes on from the pruned model, and none learns from it."""

    @property
    def exported(self) -> str:
        """Where its trained model will lie."""
        name = "model.nemo" if self.recipe.export.format == "nemo" else "model"
        return str(Path(self.recipe.runs) / self.recipe.name / "export" / name)

    @property
    def overrides(self) -> list[str]:
        """What names it to a command and to its processes."""
        return [f"{STEP}{self.name}"] if self.name else []


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a file, of a family that of the step which `step=NAME` names; raises RecipeError with one line per problem."""
    steps = picked_steps(path, overrides)
    if len(steps) > 1:
        known = ", ".join(step.name for step in steps)
        raise RecipeError(f"{path} is a family of {known}; name one with {STEP}NAME, or use minitron run for all")
    return steps[0].recipe


def picked_steps(path: str | Path, overrides: list[str] | None = None) -> list[Step]:
    """All steps of a file, or the one that an override `step=NAME` picks."""
    given = overrides or []
    names = [item.removeprefix(STEP) for item in given if item.startswith(STEP)]
    steps = load_steps(path, [item for item in given if not item.startswith(STEP)])
    known = [step.name for step in steps if step.name]
    if names and not known:
        raise RecipeError(f"{path}: {STEP}{names[0]}, but the recipe has no family; leave it out")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError(f"{path}: unknown step '{unknown[0]}'; the family's steps: {', '.join(known)}")
    return [step for step in steps if not names or step.name == names[-1]]


def load_steps(path: str | Path, overrides: list[str] | None = None) -> list[Step]:
    """Every step of a family in order; one without a name for an ordinary recipe."""
    given = overrides or []
    overrides = [item for item in given if not item.startswith(FAMILY)]
    file = _with_family(path, recipe_file(path), [item for item in given if item.startswith(FAMILY)])
    if "family" not in file:
        return [Step(validated(path, merged(path, file, overrides)))]
    family = file.pop("family")
    with told_as_one_line(path):
        _refuse_malformed(path, family)
    base = merged(path, file, overrides)
    if not base.get("name"):
        raise RecipeError(f"{path}: name is missing; folder below `runs` that the steps' folders are in")
    sources: list[Source] = [item.get("source", "previous" if number else "original") for number, item in enumerate(family)]
    teachers: list[Teacher] = [item.get("teacher", "source") for item in family]
    steps: list[Step] = []
    for number, item in enumerate(family):
        name, before = str(item.name), steps[-1] if steps else None
        values = merged(path, _with_own_keys(file, item), overrides)
        values |= _place(base, name) | _models(base, before, sources[number], teachers[number])
        trained = number + 1 == len(family) or sources[number + 1] != "pruned" or teachers[number + 1] == "previous"
        recipe = validated(f"{path}: step {name}", values)
        steps.append(Step(recipe, name, sources[number], before.name if before else "", trained))
    return steps


def checked_steps(steps: list[Step]) -> list[tuple[Step, Architecture, Architecture]]:
    """Each step with its source's and its target's architecture, those of models that do not exist yet in closed form.

    Steps that go on from a searched one are left out: what they start from is not known before the search has been run; they are checked
    when they start. Raises RecipeError with the problems of every step, before any of them runs.
    """
    found: list[tuple[Step, Architecture, Architecture]] = []
    planned: dict[str, Architecture] = {}
    problems: list[str] = []
    for number, step in enumerate(steps):
        if number and step.source != "original" and steps[number - 1].recipe.search:
            break
        try:
            source = _source_of(step, found)
            target = check_recipe(step.recipe, source, planned)
            found.append((step, source, target))
            planned[step.exported] = _as_exported(target)
        except RecipeError as error:
            problems += [f"step {step.name}: {problem}" if step.name else problem for problem in error.problems]
            break  # the steps behind have no source to be checked against
    if problems:
        raise RecipeError(problems)
    return found


def _source_of(step: Step, before: list[tuple[Step, Architecture, Architecture]]) -> Architecture:
    if step.source != "original" and before:
        return before[-1][2] if step.source == "pruned" else _as_exported(before[-1][2])
    try:
        return source_architecture(step.recipe.model.path, step.recipe.model.hf_config)
    except ArchitectureError as error:
        raise RecipeError(str(error)) from None


def _as_exported(arch: Architecture) -> Architecture:
    """Exported models have one FFN width, that of the widest layer."""
    return arch.resized(ffn=arch.ffn)


def _with_family(path: str | Path, file: DictConfig, overrides: list[str]) -> Any:
    """Interpolations stay what they are: further overrides may change what they stand for."""
    with told_as_one_line(path):
        return OmegaConf.merge(file, OmegaConf.from_dotlist(overrides))


def _with_own_keys(file: DictConfig, item: DictConfig) -> Any:
    """The file's values with a step's own in their place, the mapping of losses as a whole, as with an override."""
    own = OmegaConf.masked_copy(item, [str(key) for key in item if key not in OWN_KEYS])
    together, losses = OmegaConf.merge(file, own), OmegaConf.select(own, "distill.loss")
    if losses is not None:
        OmegaConf.update(together, "distill.loss", losses, merge=False)
    return together


def _refuse_malformed(path: str | Path, family: Any) -> None:
    if not isinstance(family, ListConfig) or not family or not all(isinstance(item, DictConfig) and item.get("name") for item in family):
        raise RecipeError(f"{path}: family: a list of steps is expected, each with a name, such as [{{name: 8b, prune: …}}, {{name: 4b, prune: …}}]")
    names = [str(item.name) for item in family]
    problems = [f"family: two steps are called {name}; give each its own name" for name in sorted({name for name in names if names.count(name) > 1})]
    for item in family:
        for key, known in (("source", get_args(Source)), ("teacher", get_args(Teacher))):
            if item.get(key, known[0]) not in known:
                problems.append(f"family: step {item.name}: {key}={item[key]}; known: {', '.join(known)}")
        if "teacher" in item and "teachers" in item:
            problems.append(f"family: step {item.name}: teacher={item.teacher} and teachers both say who teaches; leave one of them out")
    for key, alone in (("source", ("previous", "pruned")), ("teacher", ("previous",))):
        if family[0].get(key) in alone:
            problems.append(f"family: step {names[0]}: {key}={family[0][key]}, but no step is before it; leave it out")
    if problems:
        raise RecipeError([f"{path}: {problem}" for problem in problems])


def _place(base: dict[str, Any], name: str) -> dict[str, Any]:
    runs = base.get("runs", "runs")
    return {"runs": str(Path(runs) / str(base["name"])) if isinstance(runs, str) else runs, "name": name}


def _models(base: dict[str, Any], before: Step | None, source: Source, teacher: Teacher) -> dict[str, Any]:
    """Sections model and teachers of a step; before: the step whose models it may go on from."""
    models: dict[str, dict[str, Any]] = {"original": base.get("model", {})}
    if before:
        run = Path(before.recipe.runs) / before.recipe.name
        models["previous"] = {"path": before.exported}
        models["pruned"] = {
            "path": str(run / "prune" / "checkpoint"),
            "hf_config": str(run / "prune" / "hf_config.json"),
            "tokenizer": str(run / "import" / "tokenizer"),
        }
    return {"model": models[source]} | ({"teachers": {"models": [models[teacher]]}} if teacher not in ("source", source) else {})
