"""Stage `labels`: the teacher continues beginnings of the training text (sequence-level distillation, Kim & Rush, arXiv 1606.07947)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, require_disk_space
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.labels import Labels
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.batches import TokenDataset
from minitron_megatron.data.encode import EncodedBlock
from minitron_megatron.data.index import Blocks, merge, token_dtype, weights_prefix, write_block
from minitron_megatron.data.shared import shared_samples
from minitron_megatron.labels.resume import block_prefix, finished_blocks
from minitron_megatron.model.build import build_model
from minitron_megatron.model.generate import generate
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.model.sampling import Sampling
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.progress import progress
from minitron_megatron.training.given import given_teachers

SCRATCH = ("cache", "blocks")
"""Removed once the artifact is published: until then an interrupted start continues from them."""


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes train.{bin,idx}, a text each of prompt and continuation, and train-weights.{bin,idx}, 1 for what the teacher wrote.

    Returns texts, tokens and sha256, how many tokens the teacher wrote and how many texts it ended.
    """
    settings, data = labels_section(recipe), inputs["data"]
    model = _teacher(recipe, inputs, world)
    prompts = shared_samples(
        world,
        data.path / "train",
        samples=settings.samples,
        sequence_length=settings.prompt_tokens,
        seed=settings.seed,
        cache=folder / "cache",
        repeat=False,
    )
    dtype, eod = token_dtype(data.result["vocab_size"]), int(data.result["eod"])
    if world.is_main:
        needed = 2 * settings.samples * (settings.prompt_tokens + settings.new_tokens) * (np.dtype(dtype).itemsize + 4)
        require_disk_space(folder, needed, "the teacher's text")
    blocks = write_blocks(model, prompts, settings, folder / "blocks", world, dtype=dtype, eod=eod)
    world.barrier()
    return _merged(blocks, settings, folder, model.layout.describe(), eod) if world.is_main else {}


def labels_section(recipe: Recipe) -> Labels:
    """The recipe's section, without which the chain does not come here."""
    if recipe.labels is None:
        raise RuntimeError("stage labels without a section labels")
    return recipe.labels


def write_blocks(model: StageModel, prompts: TokenDataset, settings: Labels, folder: Path, world: World, *, dtype: str, eod: int) -> list[Path]:
    """Every text, in blocks on the main process; those that are there from an interrupted start are kept, whatever their size."""
    blocks: list[Path] = world.from_main(finished_blocks(folder, settings.samples) if world.is_main else None)
    done = int(blocks[-1].name.rpartition("-")[2]) if blocks else 0
    if done and world.is_main:
        print(f"labels: continues behind {done} finished texts", flush=True)
    starts = range(done, settings.samples, settings.save_every_samples)
    with progress("labels", len(starts), world) as advance:
        for start in starts:
            ids = range(start, min(start + settings.save_every_samples, settings.samples))
            texts = _write(model, prompts, ids, settings, eod)
            blocks.append(block_prefix(folder, ids.start, ids.stop))
            if world.is_main:
                write_block(blocks[-1], _encoded(texts, settings.prompt_tokens, dtype))
            advance()
    return blocks


def _write(model: StageModel, prompts: TokenDataset, ids: range, settings: Labels, eod: int) -> list[list[int]]:
    """Prompt and continuation of each sample."""
    prompts_nP = torch.stack([prompts[sample][: settings.prompt_tokens] for sample in ids])
    continuations = generate(
        model,
        prompts_nP,
        new_tokens=settings.new_tokens,
        eod=eod,
        micro_batch=settings.micro_batch,
        sampling=Sampling(settings.temperature, settings.top_p, settings.seed),
        sample_ids=ids,
    )
    return [[*prompt, *written] for prompt, written in zip(prompts_nP.tolist(), continuations, strict=True)]


def _encoded(texts: list[list[int]], prompt_tokens: int, dtype: str) -> EncodedBlock:
    weights = [np.arange(len(text)) >= prompt_tokens for text in texts]
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    return EncodedBlock(np.concatenate([np.array(text, dtype=dtype) for text in texts]), lengths, np.concatenate(weights).astype(np.float32))


def _teacher(recipe: Recipe, inputs: Mapping[str, Artifact], world: World) -> StageModel:
    """The first of the recipe's teachers: the source, corrected where a finished correction has done so, or the one in its place."""
    teacher = given_teachers(recipe, inputs, inputs.get("correct", inputs["import"]).path / "checkpoint")[0]
    layout = global_layout(writing_layout(recipe.parallel, teacher.architecture), world)
    model = build_model(teacher.architecture, layout, world.platform, torch_dtype(recipe.precision), variable_lengths=True)
    load_model(model, teacher.checkpoint)
    return model


def writing_layout(parallel: Parallel, arch: Architecture) -> Parallel:
    """The same processes without virtual stages and context ranks, and without sequence parallelism, under which no cache of keys and values helps.

    Experts under tensor parallelism want their sequence shared out: they keep it, and pay with the whole text at each token.
    """
    return parallel.without_virtual_stages().without_context().model_copy(update={"sequence": parallel.sequence and bool(arch.experts)})


def _merged(prefixes: list[Path], settings: Labels, folder: Path, layout: str, eod: int) -> dict[str, Any]:
    blocks = Blocks.of(prefixes)
    merge(blocks.weights, weights_prefix(folder / "train"))
    summary = merge(blocks, folder / "train")
    written = summary.tokens - settings.samples * settings.prompt_tokens
    how = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature}, top p {settings.top_p}"
    return {
        "summary": f"{summary.documents:,} texts, {written:,} tokens written by the teacher ({how}), {layout}",
        "parts": {"train": {"documents": summary.documents, "tokens": summary.tokens, "sha256": summary.sha256}},
        "written_tokens": written,
        "eod": eod,
    }
