"""Stage `importance`: calibration samples through the source model, hooks on, scores out (P1 section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.criteria import DEFAULT_RANKING
from minitron_megatron.config.importance import Importance, KeptSums
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.batches import FILLING, Batch, TokenDataset, collate
from minitron_megatron.data.shared import shared_samples
from minitron_megatron.importance.accumulate import BlockSums, samples_of_rank, segments
from minitron_megatron.importance.blocks import NO_BLOCKS, Blocks, collecting_blocks, make_blocks
from minitron_megatron.importance.hooks import MicroBatchSums, collecting
from minitron_megatron.importance.reduce import complete_over_sequence, fold, gather_blocks
from minitron_megatron.importance.resume import load_finished, save_finished
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.progress import progress
from minitron_megatron.scores.margins import save_scores
from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.scores.units import UnitScores

SCRATCH = ("cache", "finished")
"""Removed once the artifact is published: until then an interrupted start continues from them."""


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes scores.safetensors (sufficient statistics, margins) and summary.json (default scores, for people and the report)."""
    settings, layout = recipe.importance, global_layout(recipe.parallel.without_context(), world)
    arch = Architecture.from_dict(inputs["import"].result["architecture"])
    model = build_model(arch, layout, world.platform, torch_dtype(recipe.precision), output_layer=None)
    load_model(model, inputs["import"].path / "checkpoint")
    samples = _calibration_samples(settings, inputs["data"], folder, world)
    none_yet = Statistics(arch, 0, {}, _origin(recipe, inputs))
    statistics = measure_all(model, samples, settings, none_yet, folder / "finished", world)
    if world.is_main:
        write_json(folder / "summary.json", _summary(save_scores(statistics, folder / "scores.safetensors"), sparse=arch.experts > 0))
    tokens = settings.samples * settings.sequence_length
    return {
        "summary": f"{settings.samples} × {settings.sequence_length} = {tokens:,} tokens, {layout.describe()}, {recipe.precision}",
        "samples": settings.samples,
        "tokens": tokens,
    }


def measure_all(model: StageModel, samples: TokenDataset, settings: Importance, none_yet: Statistics, finished: Path, world: World) -> Statistics:
    """Measures what is not finished yet, segment by segment; whole on the main process.

    finished: folder with the statistics of the segments before an interruption, whatever layout measured them.
    """
    statistics = load_finished(finished, none_yet, world)
    layout, stop = model.layout, settings.skip_samples + settings.samples
    left = range(settings.skip_samples + statistics.samples, stop)
    blocks = make_blocks(settings.block_sizes, layout)
    micro_batches = len(samples_of_rank(left, 0, layout.data, settings.micro_batch))
    with progress("importance", micro_batches * len(model.chunks), world) as advance:
        for segment in segments(left, settings.save_every_samples, layout.data):
            groups = samples_of_rank(segment, layout.data_rank, layout.data, settings.micro_batch)
            sums = measure(model, [_batch(samples, ids, segment.start).to(world.platform.device) for ids in groups], advance, blocks, settings.sums)
            totals = fold(statistics.sums, gather_blocks(sums, layout, world))
            statistics = replace(statistics, samples=statistics.samples + len(segment), sums=totals)
            if world.is_main and segment.stop < stop:
                save_finished(finished, statistics)
    return statistics


def measure(model: StageModel, batches: list[Batch], advance: Callable[[], None], blocks: Blocks = NO_BLOCKS, kept: KeptSums = "all") -> BlockSums:
    """The forward pass: this process's layers, units and samples. Nothing in it waits for the device, but the exchange of experts' tokens."""
    sums = BlockSums()
    # read ahead of the pass: in it, to ask the device would wait for all that is under way
    ids = {id(batch): batch.sample_ids_B.tolist() for batch in batches}
    with collecting(model.layers(), model.last.decoder.final_layernorm, kept=kept) as found, collecting_blocks(model, blocks, found):

        def before(_: int, batch: Batch) -> None:
            found.sample_ids_B = batch.sample_ids_B

        def after(batch: Batch) -> None:
            # the schedule adds batches that are filling; of these too, this process's experts see other ranks' samples
            samples = ids.get(id(batch), [FILLING] * len(batch.tokens_BS))
            _accumulate(sums, found, samples, batch.tokens_BS.shape[1], model.layout)
            if any(sample != FILLING for sample in samples):
                advance()

        forward_only(model, batches, before=before, after=after, consume=lambda hidden, batch: None)
    return sums


def _accumulate(sums: BlockSums, found: MicroBatchSums, ids: list[int], tokens: int, layout: Layout) -> None:
    """Closes a micro-batch: completes its sums over the sequence, then takes them into the samples' blocks, a layer at a time."""
    complete_over_sequence(found, layout)
    for _, of_layer in groupby(found.token_sums, key=lambda key: key[0]):
        sums.add({key: found.token_sums[key] for key in of_layer}, tokens, ids)
    if found.cosine_sums:  # a stage may hold no layer
        sums.add_influence(found.cosine_sums, tokens, ids)
    for layer, experts in found.experts.items():
        for axis, value in experts.axes().items() if experts.samples else ():
            sums.add({(layer, axis): value if found.kept == "all" else value[:1]}, experts.tokens, experts.samples)
    found.clear()


def _calibration_samples(settings: Importance, data: Artifact, folder: Path, world: World) -> TokenDataset:
    return shared_samples(
        world,
        data.path / "train",
        samples=settings.skip_samples + settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        cache=folder / "cache",
        repeat=False,
    )


def _batch(samples: TokenDataset, ids: Sequence[int], stand_in: int) -> Batch:
    """A micro-batch; a dummy runs the stand-in's tokens under its own id, which counts for nothing."""
    batch = collate(samples, [stand_in if sample == FILLING else sample for sample in ids])
    return replace(batch, sample_ids_B=torch.tensor(ids, dtype=torch.int64))


def _origin(recipe: Recipe, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What is measured on what: parts that agree in all but `parts` can be merged."""
    settings = recipe.importance
    part = {
        "data": inputs["data"].result["parts"]["train"]["sha256"],
        "seed": settings.seed,
        "first_sample": settings.skip_samples,
        "samples": settings.samples,
    }
    return {
        "model": inputs["import"].result["weights_sha256"],
        "sequence_length": settings.sequence_length,
        "precision": recipe.precision,
        **({} if settings.sums == "all" else {"sums": settings.sums}),  # as in files of before there was a choice
        "parts": [part],
    }


def _summary(scores: UnitScores, *, sparse: bool) -> dict[str, Any]:
    """The default scores and what they are: by other criteria the same file ranks otherwise."""
    return {
        "ranked_by": DEFAULT_RANKING.to_dict(sparse=sparse),
        "ffn": [values.tolist() for values in scores.ffn],
        "heads": [values.tolist() for values in scores.heads],
        "kv_groups": [values.tolist() for values in scores.kv_groups],
        "experts": [values.tolist() for values in scores.experts],
        "channels": scores.channels.tolist(),
        "block_influence": scores.layers.tolist(),
    }
