"""Stage `depth`: which layers are dropped, chosen by what the model is without them (P1 section 2.2, P2 sections 2.2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.checks.target import target_architecture
from minitron_megatron.config.depth import Depth
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.shared import shared_samples
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.depth.choice import Choice, Layers, Measure, Round, choose
from minitron_megatron.depth.measured import Measured, of_samples
from minitron_megatron.depth.measures import LmLoss, LogitError, batches_of_rank
from minitron_megatron.depth.result import depth_result, summary
from minitron_megatron.depth.resume import Finished
from minitron_megatron.errors import DataError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.model.skip import without_layers
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.progress import progress
from minitron_megatron.scores.influence import influence_of_blocks
from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.tasks.accuracy import task_files_outside
from minitron_megatron.tasks.ask import accuracies_of_model

SCRATCH = ("cache", "finished")
"""Removed once the artifact is published: until then an interrupted start continues from them."""


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes depth.json: every candidate's figure with its standard error, the order in which layers go, how clear each choice is."""
    settings, arch = section(recipe), Architecture.from_dict(inputs["import"].result["architecture"])
    candidates = range(settings.first_protected, arch.layers - settings.last_protected)
    drop = settings.drop or arch.layers - target_architecture(recipe, arch).layers
    choice = Choice(settings.how, drop, candidates, higher_is_better=settings.criterion == "task")
    if settings.criterion == "influence":
        baseline, rounds = None, choose(choice, influence(Statistics.load(inputs["importance"].path / "scores.safetensors")))
    else:
        baseline, rounds = _measure_all(choice, recipe, inputs, folder, world)
    found = depth_result(settings, baseline, rounds)
    if world.is_main:
        write_json(folder / "depth.json", found)
    return {"summary": summary(settings, choice, rounds), **{name: found[name] for name in ("order", "dropped_layers", "is_noise")}}


def outside_files(recipe: Recipe) -> list[Path]:
    return task_files_outside(section(recipe).tasks)


def section(recipe: Recipe) -> Depth:
    if recipe.depth is None:
        raise RuntimeError("a recipe without a section depth has no stage depth")
    return recipe.depth


def influence(statistics: Statistics) -> Measure:
    """Of a layer, or of a contiguous block, out of the scores file."""

    def measure(layers: Layers) -> Measured:
        values, errors = influence_of_blocks(statistics, len(layers))
        error = float(errors[layers[0]])
        return Measured(float(values[layers[0]]), None if math.isnan(error) else error)

    return measure


def _measure_all(choice: Choice, recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> tuple[Measured, list[Round]]:
    """The whole model's figure, and every round's; with a bar over all candidates and the time that is left."""
    finished, has_baseline = Finished(folder / "finished", world), section(recipe).criterion != "logit_error"
    with progress("depth", max(choice.measurements + has_baseline - len(finished), 1), world) as advance:
        measure = finished.or_else(_measure_on_use(recipe, inputs, folder, world, advance))
        return measure(()) if has_baseline else Measured(0.0, None), choose(choice, measure)


def _measure_on_use(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World, advance: Callable[[], None]) -> Measure:
    """The model is built when the first candidate is asked for: a start that finds all of them measured only writes the artifact."""
    made: list[tuple[StageModel, Callable[[], Measured]]] = []

    def measure(layers: Layers) -> Measured:
        if not made:
            model = _model(recipe, inputs, world)
            made.append((model, _criterion(model, recipe, inputs, folder, world)))
        model, criterion = made[0]
        with without_layers(model, layers):
            found = criterion()
        advance()
        return found

    return measure


def _model(recipe: Recipe, inputs: Mapping[str, Artifact], world: World) -> StageModel:
    asks_tasks = section(recipe).criterion == "task"
    # tasks have requests of many lengths, which an interleaved pipeline does not take
    parallel = recipe.parallel.without_virtual_stages() if asks_tasks else recipe.parallel
    layout = global_layout(parallel.without_context(), world)
    arch = Architecture.from_dict(inputs["import"].result["architecture"])
    model = build_model(arch, layout, world.platform, torch_dtype(recipe.precision), variable_lengths=asks_tasks)
    load_model(model, inputs["import"].path / "checkpoint")
    return model


def _criterion(model: StageModel, recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> Callable[[], Measured]:
    """What is measured of the model as it is at the call; made while it is whole."""
    settings = section(recipe)
    if settings.criterion == "task":
        tokenizer = load_tokenizer(recipe.data.tokenizer or inputs["import"].path / "tokenizer")
        return lambda: mean_accuracy(
            accuracies_of_model(model, settings.tasks, items=settings.task_items, tokenizer=tokenizer, world=world), settings.task_metric
        )
    dataset = shared_samples(
        world,
        inputs["data"].path / "train",
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        cache=folder / "cache",
        repeat=False,
    )
    batches = batches_of_rank(dataset, settings.samples, settings.micro_batch, model.layout, world.platform.device)
    sums: Callable[[], Tensor] = (
        LmLoss(model, batches, settings.samples)
        if settings.criterion == "perplexity"
        else LogitError(model, batches, settings.samples, device_bytes=settings.reference_device_gib * 2**30)
    )
    return lambda: of_samples(sums())


def mean_accuracy(accuracies: dict[str, dict[str, dict[str, float | None]]], metric: str) -> Measured:
    """Over tasks, which are independent; NaN on processes that got none. Raises DataError where a task has no such metric."""
    if not accuracies:
        return Measured(math.nan, None)
    missing = [task for task, metrics in accuracies.items() if metric not in metrics]
    if missing:
        raise DataError(f"depth.task_metric={metric} is not measured by {', '.join(missing)}; name it in the task file, or take another")
    figures = [metrics[metric] for metrics in accuracies.values()]
    values, errors = ([figure[key] for figure in figures] for key in ("value", "stderr"))
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(figures) if len(known) == len(figures) else None
    return Measured(sum(value or 0.0 for value in values) / len(figures), stderr)
