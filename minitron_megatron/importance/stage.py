"""Stage `importance`: calibration samples through the source model, hooks on, scores out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.schema import Importance, ImportanceAggregation, Recipe
from minitron_megatron.data.batches import FILLING, Batch, collate
from minitron_megatron.data.shared import shared_samples
from minitron_megatron.importance.accumulate import BlockSums, blocks_of, samples_of_rank
from minitron_megatron.importance.hooks import MicroBatchSums, collecting
from minitron_megatron.importance.reduce import complete_over_sequence, reduce_statistics
from minitron_megatron.model.gpt import StageModel, build_model
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.progress import progress
from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.scores.units import UnitScores, activation_scores

SCRATCH = ("cache",)
"""Removed once the artifact is published."""


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes scores.safetensors (sufficient statistics) and summary.json (default scores, for people and the report)."""
    settings, layout = recipe.importance, global_layout(recipe.parallel, world)
    arch = Architecture.from_dict(inputs["import"].result["architecture"])
    # the last micro-batch of a block may be smaller, which pipeline stages have to tell each other
    uneven = settings.micro_batch > 1
    model = build_model(arch, layout, world.platform, torch_dtype(recipe.precision), output_layer=None, variable_lengths=uneven)
    load_model(model, inputs["import"].path / "checkpoint")
    batches = _calibration_batches(settings, inputs["data"], folder, layout, world)
    sums = measure(model, batches, blocks_of(settings.samples), world)
    totals = reduce_statistics(sums, layout, world)
    tokens = settings.samples * settings.sequence_length
    if totals is not None:
        origin = {
            "model": inputs["import"].result["weights_sha256"],
            "data": inputs["data"].result["parts"]["train"]["sha256"],
            "sequence_length": settings.sequence_length,
            "precision": recipe.precision,
        }
        statistics = Statistics(arch, settings.samples, totals, origin)
        statistics.save(folder / "scores.safetensors")
        default = ImportanceAggregation()
        write_json(folder / "summary.json", _summary(activation_scores(statistics, batch=default.batch, sequence=default.sequence)))
    return {
        "summary": f"{settings.samples} × {settings.sequence_length} = {tokens:,} tokens, {layout.describe()}, {recipe.precision}",
        "samples": settings.samples,
        "tokens": tokens,
    }


def measure(model: StageModel, batches: list[Batch], blocks: int, world: World) -> BlockSums:
    """The forward pass: this process's layers, units and samples."""
    sums = BlockSums(blocks)
    with collecting(model) as found, progress("importance", len(batches) * len(model.chunks), world) as advance:

        def after(batch: Batch) -> None:
            if FILLING in batch.sample_ids_B:
                found.clear()
                return
            _accumulate(sums, found, batch, model.layout)
            advance()

        forward_only(model, batches, after=after, consume=lambda hidden, batch: None)
    return sums


def _accumulate(sums: BlockSums, found: MicroBatchSums, batch: Batch, layout: Layout) -> None:
    """Closes a micro-batch: completes its sums over the sequence, then takes them into the samples' blocks."""
    complete_over_sequence(found, layout)
    ids, tokens = batch.sample_ids_B.tolist(), batch.tokens_BS.shape[1]
    for key, value in found.token_sums.items():
        sums.add(key, value, tokens, ids)
    for layer, cosines in found.cosine_sums.items():
        sums.add_influence(layer, cosines, tokens, ids)
    found.clear()


def _calibration_batches(settings: Importance, data: Artifact, folder: Path, layout: Layout, world: World) -> list[Batch]:
    samples = shared_samples(
        world,
        data.path / "train",
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        cache=folder / "cache",
        repeat=False,
    )
    groups = samples_of_rank(settings.samples, layout.data_rank, layout.data, settings.micro_batch)
    return [collate(samples, ids).to(world.platform.device) for ids in groups]


def _summary(scores: UnitScores) -> dict[str, Any]:
    return {
        "ffn": [values.tolist() for values in scores.ffn],
        "heads": [values.tolist() for values in scores.heads],
        "channels": scores.channels.tolist(),
        "block_influence": scores.layers.tolist(),
    }
