"""Stage `teacher-logits`: the teacher over the samples that the distillation will read, and over the held-out ones, under any layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, find_artifact, require_disk_space
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.teacher_logits import TeacherLogits
from minitron_megatron.data.batches import FILLING, Batch, TokenDataset, collate
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.sequence import whole_sequence
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.progress import progress
from minitron_megatron.stored.blocks import block_path, is_whole, is_written, text_digest, write_block
from minitron_megatron.stored.records import OutputFormat
from minitron_megatron.teacher_logits.outputs import sample_record
from minitron_megatron.training.given import given_teachers
from minitron_megatron.training.job import Job
from minitron_megatron.training.training_checkpoint import Progress

SCRATCH = ("cache",)
"""Removed once the artifact is published: until then an interrupted start continues from it."""
PARTS = ("train", "heldout")


@dataclass(frozen=True)
class Block:
    """Consecutive samples of one part: one file."""

    part: str
    ids: range

    def path(self, folder: Path) -> Path:
        return block_path(folder / self.part, self.ids)


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes train/ and heldout/, see stored/blocks.py; result: format, samples of each part, bytes."""
    settings, samples = teacher_logits_section(recipe), wanted_samples(recipe)
    teacher = given_teachers(recipe, inputs, inputs.get("correct", inputs["import"]).path / "checkpoint")[0]
    form = output_format(recipe, teacher.architecture)
    texts = Job("distill", recipe.distill, recipe, folder, world).texts(inputs, Progress(step=recipe.distill.steps, samples=samples))
    parts = dict(zip(PARTS, texts, strict=True))
    blocks = blocks_of({part: len(dataset) for part, dataset in parts.items()}, settings.block_samples)
    left = world.from_main(_unfinished(blocks, folder) if world.is_main else None)
    if world.is_main:
        needed = sum(len(block.ids) for block in left) * recipe.distill.sequence_length * form.raw_bytes_per_token
        require_disk_space(folder, int(needed), "the teacher's outputs")
    layout = global_layout(recipe.parallel.without_context(), world)
    if left:
        fp8 = recipe.fp8.of_teacher if recipe.fp8 else None
        model = build_model(teacher.architecture, layout, world.platform, torch_dtype(recipe.precision_of_teacher), fp8=fp8)
        load_model(model, teacher.checkpoint)
        write_blocks(model, parts, left, settings, form, folder, world)
    world.barrier()
    return _result(blocks, recipe, form, folder, layout.describe()) if world.is_main else {}


def covers(recipe: Recipe, artifact: Artifact) -> bool:
    """Whether every block that the recipe's distillation reads is there."""
    result = artifact.result
    blocks = blocks_of(result["samples"], result["format"]["block_samples"])
    enough = result["samples"]["train"] >= wanted_samples(recipe) and result["windows_asked"] >= recipe.distill.validation_samples
    return enough and all(block.path(artifact.path).is_file() for block in blocks)


def teacher_logits_section(recipe: Recipe) -> TeacherLogits:
    """The recipe's section, without which the chain does not come here."""
    if recipe.teacher_logits is None:
        raise RuntimeError("stage teacher-logits without a section teacher_logits")
    return recipe.teacher_logits


def wanted_samples(recipe: Recipe) -> int:
    """Of the training text."""
    return teacher_logits_section(recipe).samples or recipe.distill.steps * recipe.distill.global_batch


def output_format(recipe: Recipe, teacher: Architecture) -> OutputFormat:
    settings = teacher_logits_section(recipe)
    classes = settings.k if settings.kind == "top_k" else settings.draws
    sizes = (classes, teacher.vocab, recipe.distill.sequence_length)
    return OutputFormat(settings.kind, *sizes, settings.temperature, settings.log_probs, settings.block_samples)


def blocks_of(samples: Mapping[str, int], block_samples: int) -> list[Block]:
    return [Block(part, range(at, min(at + block_samples, count))) for part, count in samples.items() for at in range(0, count, block_samples)]


def write_blocks(
    model: StageModel,
    parts: Mapping[str, TokenDataset],
    blocks: Sequence[Block],
    settings: TeacherLogits,
    form: OutputFormat,
    folder: Path,
    world: World,
) -> None:
    """Blocks are dealt round to the data-parallel ranks, each of which writes its own."""
    layout = model.layout
    rounds = range(0, len(blocks), layout.data)
    with progress("teacher-logits", len(rounds), world) as advance:
        for first in rounds:
            mine = blocks[first : first + layout.data][layout.data_rank : layout.data_rank + 1]
            batches = [batch.to(world.platform.device) for block in mine for batch in _batches(parts[block.part], block.ids, settings.micro_batch)]
            part = PARTS.index(mine[0].part) if mine else 0
            records = forward_only(model, batches, consume=partial(_records, model, settings, form, part))
            if mine and layout.is_last_stage and layout.tensor_rank == 0:
                write_block(mine[0].path(folder), [record for some in records for record in some])
            advance()


def _batches(dataset: TokenDataset, ids: range, micro_batch: int) -> list[Batch]:
    """Of one shape, which a pipeline's stages agree on ahead: the last one of a block is filled up with its first sample."""
    groups = [list(ids[at : at + micro_batch]) for at in range(0, len(ids), micro_batch)]
    filled = [[*some, *[FILLING] * (micro_batch - len(some))] for some in groups]
    return [
        replace(collate(dataset, [ids[0] if number == FILLING else number for number in some]), sample_ids_B=torch.tensor(some)) for some in filled
    ]


def _records(
    model: StageModel, settings: TeacherLogits, form: OutputFormat, part: int, hidden_SBD: Tensor, batch: Batch
) -> list[tuple[bytes, bytes]]:
    """(text's digest, compressed bytes) of each sample, on the last stage."""
    whole_SBD, found = whole_sequence(hidden_SBD, model.layout), []
    for place, sample in enumerate(batch.sample_ids_B.tolist()):
        if sample != FILLING:
            record = sample_record(model, whole_SBD[:, place], settings, [settings.seed, part, sample])
            data = form.encode(record) if model.layout.tensor_rank == 0 else b""
            found.append((text_digest(batch.tokens_BS[place]), data))
    return found


def _unfinished(blocks: Sequence[Block], folder: Path) -> list[Block]:
    """Without those of an interrupted start, and of an earlier artifact of the same identity, whose whole files are taken over."""
    earlier, identity = find_artifact(folder.parent, "teacher-logits"), folder / "identity"
    if earlier and identity.is_file() and earlier.id == identity.read_text():
        for block in blocks:
            if not is_written(block.path(folder)) and is_whole(block.path(earlier.path)):
                block.path(folder).parent.mkdir(exist_ok=True)
                _link_or_copy(block.path(earlier.path), block.path(folder))
    left = [block for block in blocks if not is_written(block.path(folder))]
    if len(left) < len(blocks):
        print(f"teacher-logits: {len(blocks) - len(left)} of {len(blocks)} blocks are finished already", flush=True)
    return left


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)


def _result(blocks: Sequence[Block], recipe: Recipe, form: OutputFormat, folder: Path, layout: str) -> dict[str, Any]:
    samples = {part: sum(len(block.ids) for block in blocks if block.part == part) for part in PARTS}
    size, tokens = sum(block.path(folder).stat().st_size for block in blocks), sum(samples.values()) * form.sequence_length
    what = f"top {form.classes} in {form.log_probs}" if form.kind == "top_k" else f"{form.classes} draws"
    return {
        "summary": f"{samples['train']} + {samples['heldout']} samples, {tokens:,} tokens, {what}: {size / tokens:.1f} bytes a token, {layout}",
        "format": form.to_dict(),
        "samples": samples,
        "windows_asked": recipe.distill.validation_samples,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
    }
