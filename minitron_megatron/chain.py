"""The chain of stages: what each one reads, what shapes its result, and how one is run and published."""

from __future__ import annotations

import importlib
import platform as machine
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron_megatron import __version__
from minitron_megatron.artifact import Artifact, artifact_id, draft, find_artifact, open_artifact, partial_folder, publish
from minitron_megatron.config.distill import MAY_CHANGE_IN_A_RUN
from minitron_megatron.config.schema import Recipe
from minitron_megatron.environment import recorded
from minitron_megatron.errors import ArtifactError, RecipeError
from minitron_megatron.parallel.world import World
from minitron_megatron.status import steps_of, tell


@dataclass(frozen=True)
class Stage:
    """One verb: a job that reads artifacts and publishes one."""

    name: str
    module: str
    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    """Parts of the recipe that shape the result; layouts do not, so a finished stage serves every layout."""
    distributed: bool
    """Whether several processes share the work."""
    streams: bool = False
    """Whether it moves tensors without building a model: on the CPU, and the recipe's precision is none of its business."""
    continues: tuple[str, ...] = ()
    """Fields of those parts that may change between two starts of an unfinished run: its work is found again, under another id."""
    spares: tuple[str, ...] = ()
    """Fields of those parts that do not shape its result."""
    directs: bool = False
    """Whether it is one process that has others started, as jobs of their own, which compute in the recipe's precision."""
    asked_by: str = ""
    """Section of the recipe without which the stage is no part of the chain; every chain has the others."""

    @property
    def computes(self) -> bool:
        """Whether it, or what it has started, builds models: then the device and the recipe's precision are its business."""
        return self.directs or (self.distributed and not self.streams)


def _may_change(section: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in MAY_CHANGE_IN_A_RUN)


MAY_CHANGE_IN_A_SEARCH = tuple(f"search.{name}" for name in ("space", "parameters", "nonembedding_parameters", "tolerance", "shortlist", "pool"))
"""Which candidates are trained: what one that is trained in both gave is kept."""

STAGES = {
    stage.name: stage
    for stage in (
        Stage("import", "convert.import_stage", (), ("model",), False, streams=True),
        Stage("data", "data.stage", ("import",), ("data",), False),
        Stage("chat", "data.chat.stage", ("import",), ("chat",), False, asked_by="chat"),
        Stage("importance", "importance.stage", ("import", "data"), ("importance",), True),
        Stage("depth", "depth.stage", ("import", "data", "importance"), ("depth",), True, asked_by="depth"),
        Stage("teachers", "convert.teachers_stage", ("import",), ("teachers",), False, streams=True, asked_by="teachers"),
        Stage(
            "correct",
            "correct.stage",
            ("import", "data", "chat"),
            ("correct", "student_fp8"),
            True,
            continues=_may_change("correct"),
            asked_by="correct",
        ),
        Stage("labels", "labels.stage", ("import", "data", "teachers", "correct"), ("labels",), True, asked_by="labels"),
        Stage(
            "teacher-logits",
            "teacher_logits.stage",
            ("import", "data", "chat", "labels", "teachers", "correct"),
            ("teacher_logits", "distilled_text", "teacher_numbers"),
            True,
            asked_by="teacher_logits",
        ),
        Stage(
            "search",
            "search.stage",
            ("import", "data", "chat", "importance", "teachers", "correct", "labels"),
            ("search", "prune", "fp8_multiple", "distill", "teacher_weights", "student_fp8", "live_teacher_numbers"),
            False,
            continues=MAY_CHANGE_IN_A_SEARCH,
            spares=("prune.target", "distill.steps", "distill.validate_every_steps"),
            directs=True,
            asked_by="search",
        ),
        Stage("prune", "prune.stage", ("import", "importance", "depth", "search"), ("prune", "fp8_multiple"), True, streams=True),
        Stage(
            "distill",
            "distill.stage",
            ("import", "data", "chat", "labels", "prune", "teachers", "correct", "teacher-logits"),
            ("distill", "teacher_weights", "correct_beside", "student_fp8", "live_teacher_numbers"),
            True,
            continues=_may_change("distill"),
        ),
        Stage(
            "finetune",
            "finetune.stage",
            ("chat", "distill"),
            ("finetune", "student_fp8"),
            True,
            continues=_may_change("finetune"),
            asked_by="finetune",
        ),
        Stage("evaluate", "evaluate.stage", ("import", "data", "prune", "teachers", "correct", "distill", "finetune"), ("evaluate",), True),
        Stage("export", "convert.export_stage", ("import", "prune", "distill", "finetune"), ("export",), False, streams=True),
        Stage(
            "report",
            "report.stage",
            (
                *("import", "data", "chat", "importance", "depth", "teachers", "correct", "labels", "search", "prune"),
                *("distill", "finetune", "evaluate", "export"),
            ),
            (),
            False,
        ),
    )
}


def stages_of(recipe: Recipe) -> list[Stage]:
    """The recipe's chain, in order, without what runs beside it."""
    return [stage for stage in STAGES.values() if is_asked(stage, recipe) and stage.name not in _beside(recipe)]


def is_asked(stage: Stage, recipe: Recipe) -> bool:
    return not stage.asked_by or getattr(recipe, stage.asked_by) is not None


def _beside(recipe: Recipe) -> tuple[str, ...]:
    """Stages that are jobs of their own, started by hand while the chain runs."""
    return ("correct",) if recipe.correct_beside else ()


def require_asked(stage: Stage, recipe: Recipe, recipe_path: str) -> None:
    """Raises RecipeError for a stage whose section the recipe lacks."""
    if not is_asked(stage, recipe):
        raise RecipeError(f"{recipe_path}: no section '{stage.asked_by}', so there is nothing for stage {stage.name} to do; add the section")


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.runs) / recipe.name


def stage_id(stage: Stage, recipe: Recipe, inputs: dict[str, Artifact]) -> str:
    """What the stage's artifact would be called now: equal to the published one's id when nothing changed."""
    return _hash(stage, recipe, inputs, stage_settings(stage, recipe))


def run_id(stage: Stage, recipe: Recipe, inputs: dict[str, Artifact]) -> str:
    """What an unfinished run is known by: starts of one run may differ in what its stage lets `continue`."""
    settings = stage_settings(stage, recipe)
    lasting = {
        section: {name: value for name, value in part.items() if f"{section}.{name}" not in stage.continues} for section, part in settings.items()
    }
    return _hash(stage, recipe, inputs, lasting)


def _hash(stage: Stage, recipe: Recipe, inputs: dict[str, Artifact], settings: dict[str, Any]) -> str:
    if stage.computes:
        settings = {**settings, "precision": recipe.precision}
    return artifact_id(stage.name, settings, {name: artifact.id for name, artifact in inputs.items()}, outside_files(stage, recipe))


def outside_files(stage: Stage, recipe: Recipe) -> list[Path]:
    """What the stage reads beside its input artifacts; raises a MinitronError that names a file that is not there."""
    module = _module(stage)
    return module.outside_files(recipe) if hasattr(module, "outside_files") else []


def stage_settings(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Of the sections that the recipe has."""
    parts = {section: getattr(recipe, section) for section in stage.sections}
    shaping = {section: part.shaping() for section, part in parts.items() if part is not None}
    return {section: {name: value for name, value in part.items() if f"{section}.{name}" not in stage.spares} for section, part in shaping.items()}


def stage_inputs(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """The stages whose artifacts it reads under this recipe: pruning by scores from elsewhere needs no importance pass of this run, and
    nothing waits for a correction beside the distillation."""
    spared = {*_beside(recipe), *_spared(stage, recipe)}
    return tuple(name for name in stage.inputs if name not in spared and is_asked(STAGES[name], recipe))


def _spared(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    scores = ("importance",) if stage.name in ("search", "prune") and not recipe.prune.reads_importance else ()
    chats = ("chat",) if stage.name in ("correct", "teacher-logits", "search", "distill") and recipe.distill.text != "chat" else ()
    if stage.name == "distill":
        return (*chats, *(("teachers", "correct") if recipe.distill.teacher_outputs == "stored" else ("teacher-logits",)))
    if scores or chats:
        return (*scores, *chats)
    if stage.name == "depth" and recipe.depth is not None:
        return ("data",) if recipe.depth.reads_importance else ("importance",)
    if stage.name == "evaluate":
        return tuple(made_by for model, made_by in (("distilled", "distill"), ("finetuned", "finetune")) if model not in recipe.evaluate.names)
    return ()


def refuse_foreign_inputs(inputs: dict[str, Artifact], recipe: Recipe, recipe_path: str) -> None:
    """Raises ArtifactError for an input made with other settings than the recipe's, or from another model than the other inputs."""
    for name, artifact in inputs.items():
        if artifact.manifest.get("settings") != stage_settings(STAGES[name], recipe):
            raise ArtifactError(
                f"{artifact.path} was made with other settings than this recipe's ({', '.join(STAGES[name].sections)}); "
                f"make it anew with: minitron {name} {recipe_path}"
            )
        for origin, identity in artifact.manifest["inputs"].items():
            if origin in inputs and inputs[origin].id != identity:
                raise ArtifactError(
                    f"{artifact.path} was made from another {origin} than {inputs[origin].path}; make it anew with: minitron {name} {recipe_path}"
                )


def finished(stage: Stage, recipe: Recipe) -> Artifact | None:
    """The stage's artifact where it is published and its inputs and settings are unchanged."""
    inputs = {name: find_artifact(run_folder(recipe), name) for name in stage_inputs(stage, recipe)}
    artifact = find_artifact(run_folder(recipe), stage.name)
    known = {name: found for name, found in inputs.items() if found is not None}
    if artifact is None or len(known) < len(inputs) or artifact.id != stage_id(stage, recipe, known):
        return None
    return artifact if covers(stage, recipe, artifact) else None


def covers(stage: Stage, recipe: Recipe, artifact: Artifact) -> bool:
    """Whether an artifact of the right id holds all that the recipe reads of it: some stages add to what they have published."""
    module = _module(stage)
    return bool(module.covers(recipe, artifact)) if hasattr(module, "covers") else True


def run_stage(stage: Stage, recipe: Recipe, recipe_path: str, world: World) -> Artifact | None:
    """Runs a stage in this process (one of world.size) and publishes its artifact; returned on the main process."""
    folder, started = run_folder(recipe), time.monotonic()
    inputs = {name: open_artifact(folder, name, recipe_path) for name in stage_inputs(stage, recipe)}
    refuse_foreign_inputs(inputs, recipe, recipe_path)
    if hasattr(_module(stage), "before"):
        _module(stage).before(recipe)
    identity = stage_id(stage, recipe, inputs)
    with draft(folder, stage.name, run_id(stage, recipe, inputs)) if world.is_main else nullcontext(partial_folder(folder, stage.name)) as partial:
        world.barrier()
        if world.is_main:
            tell(partial, "running", **steps_of(partial))
        arguments = (recipe, inputs, partial, *((world,) if stage.distributed else ()))
        result = _module(stage).run(*arguments)
        world.barrier()
        if not world.is_main or result is None:  # None: paused, the next start goes on
            return None
        seconds = round(time.monotonic() - started, 1)
        manifest = {**_manifest(stage, recipe, inputs, identity, world, seconds), **result.pop("provenance", {})}
        tell(partial, "finished", seconds=seconds)
        artifact = publish(folder, stage.name, manifest, result)
        for scratch in getattr(_module(stage), "SCRATCH", ()):
            shutil.rmtree(artifact.path / scratch, ignore_errors=True)
        return artifact


def _module(stage: Stage) -> Any:
    return importlib.import_module(f"minitron_megatron.{stage.module}")


def _manifest(stage: Stage, recipe: Recipe, inputs: dict[str, Artifact], identity: str, world: World, seconds: float) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "id": identity,
        "recipe": recipe.model_dump(mode="json"),
        "settings": stage_settings(stage, recipe),
        "inputs": {name: artifact.id for name, artifact in inputs.items()},
        "layout": {**_sizes(stage, recipe), "processes": world.size},
        "platform": world.platform.kind,
        "environment": recorded(),
        "versions": {
            "minitron_megatron": __version__,
            "python": machine.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
        },
        "seconds": seconds,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _sizes(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Of the process groups, where the stage has any."""
    return recipe.parallel.model_dump() if stage.distributed and not stage.streams else {}
