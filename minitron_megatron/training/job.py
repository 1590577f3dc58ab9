"""What the stages that train do before and after the loop: checks, text, weights and result."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact, require_disk_space
from minitron_megatron.checkpoint.sharded import load_model, save_state
from minitron_megatron.checkpoint.torch_dist import MegatronSource, weights_digest
from minitron_megatron.config.distill import TrainingRun
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.answers import answer_samples, heldout_answers
from minitron_megatron.data.batches import TokenDataset
from minitron_megatron.data.samples import evaluation_windows
from minitron_megatron.data.shared import training_text
from minitron_megatron.errors import RecipeError, TrainingError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.parallel.world import World
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.published import published_state
from minitron_megatron.training.student import Student, make_student
from minitron_megatron.training.teachers import NoTeachers
from minitron_megatron.training.training_checkpoint import Progress, newest_progress

SCRATCH = ("training", "cache")
"""Removed once the artifact is published: until then an interrupted start continues from them."""

Texts = tuple[TokenDataset, TokenDataset]
"""To train on, and held out."""


@dataclass(frozen=True)
class Job:
    """One start of a stage that trains; stage: its name, and its section of the recipe."""

    stage: str
    settings: TrainingRun
    recipe: Recipe
    folder: Path
    world: World

    @cached_property
    def layout(self) -> Layout:
        return global_layout(self.recipe.parallel, self.world)

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.recipe.precision)

    def begin(self, arch: Architecture, *, further_bytes: int = 0) -> Progress:
        """How far earlier starts have come; raises before anything is loaded where this one could not be finished."""
        if self.settings.wandb and importlib.util.find_spec("wandb") is None:
            raise RecipeError(f"{self.stage}.wandb: the package wandb is not installed; install it with: pip install 'minitron_megatron[wandb]'")
        if self.world.is_main:
            written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            needed = training_bytes(arch, self.dtype, self.settings.keep_checkpoints + 1) + further_bytes
            require_disk_space(self.folder, needed - written, "the training checkpoints")
        before = newest_progress(self.folder / "training")
        if before.step > self.settings.steps:
            finished = f"{self.folder}: {before.step} steps are finished"
            raise TrainingError(f"{finished}; set {self.stage}.steps to {before.step} or more, or remove the folder")
        return before

    def samples(self, before: Progress) -> int:
        """Of the whole run, those that are consumed already included."""
        return before.samples + (self.settings.steps - before.step) * self.settings.global_batch

    def texts(self, inputs: Mapping[str, Artifact], before: Progress, *, mask_boundaries: bool = False) -> Texts:
        """Samples of what training_text finds in the inputs, and windows of the held-out text; of conversations where the stage reads any."""
        length = self.settings.sequence_length
        if "chat" in inputs:
            return self._answers(inputs["chat"], before)
        training = training_text(
            self.world,
            inputs,
            samples=self.samples(before),
            sequence_length=length,
            seed=self.settings.seed,
            cache=self.folder / "cache",
            mask_boundaries=mask_boundaries,
        )
        heldout = inputs["data"].path / "heldout"
        return training, evaluation_windows(heldout, sequence_length=length, tokens=self.settings.validation_samples * length)

    def _answers(self, chat: Artifact, before: Progress) -> Texts:
        """Packed anew from the conversations' lengths where the length of a sample is another than the chat stage's."""
        settings, packing = self.settings, chat.result["packing"]
        samples, length = self.samples(before), settings.sequence_length
        training = answer_samples(chat.path / "train", samples=samples, sequence_length=length, seed=settings.seed, packing=packing)
        return training, heldout_answers(chat.path / "heldout", sequence_length=length, at_most=settings.validation_samples)

    def student(self, arch: Architecture, checkpoint: Path, *teachers: Architecture) -> StageModel:
        """The model that is trained, filled from a checkpoint; its layers are dealt out with the teachers' work in mind."""
        model = build_model(
            arch,
            self.layout,
            self.world.platform,
            self.dtype,
            output_layer=DistillationOutputLayer,
            ends=distillation_work(arch, *teachers),
            trainable=True,
            recompute=self.recipe.training.recompute,
            overlap_exchange=self.recipe.training.overlap_tensor_parallel,
            deterministic=self.recipe.training.deterministic,
            fp8=self.recipe.fp8.of_student if self.recipe.fp8 else None,
        )
        load_model(model, checkpoint)
        return model

    def train_alone(
        self, arch: Architecture, checkpoint: Path, texts: Texts, saved: Callable[[Student, Progress], None] | None = None
    ) -> dict[str, Any]:
        """Trains a model without a teacher, on the cross-entropy alone, publishes its weights and returns the stage's result."""
        model, settings = self.student(arch, checkpoint), self.settings
        student = make_student(model, settings, self.recipe.training)
        loop = TrainingLoop(self.stage, settings, self.layout, self.world, NoTeachers(), student, *texts)
        if saved:
            loop.saved = lambda progress: saved(student, progress)
        last = loop.run(self.folder, self.recipe)
        self.publish_weights(published_state(student))
        return self.result(arch, loop, last, f"perplexity {last['perplexity']:.2f}")

    def publish_weights(self, state: dict[str, Any]) -> None:
        """The model's weights alone, without the optimizer's state."""
        if self.world.is_main:
            (self.folder / "checkpoint").mkdir(exist_ok=True)
        self.world.barrier()
        save_state(state, self.folder / "checkpoint")
        self.world.barrier()

    def result(self, arch: Architecture, loop: TrainingLoop, last: dict[str, float], told: str, teachers: str = "") -> dict[str, Any]:
        """What the artifact tells; last: the last validation, told: it in words, teachers: their layouts."""
        steps, tokens = self.settings.steps, loop.progress.samples * self.settings.sequence_length
        how = f"{self.layout.describe()}{teachers}, {self._numbers()}"
        return {
            "summary": f"{steps} steps, {tokens:,} tokens, {how}; held-out {told}",
            "architecture": arch.to_dict(),
            "parameters": parameter_count(arch),
            "steps": steps,
            "tokens": tokens,
            "starts": list(loop.progress.starts),
            "validation": last,
            "weights_sha256": weights_digest(MegatronSource(self.folder / "checkpoint", arch)) if self.world.is_main else "",
            **({"teacher": loop.teachers.identity} if loop.teachers.identity else {}),
        }

    def _numbers(self) -> str:
        """What the trained model computes in, in words."""
        fp8 = self.recipe.fp8.of_student if self.recipe.fp8 else None
        return self.recipe.precision + (f" and {'emulated ' if fp8.emulated else ''}FP8 ({fp8.scaling})" if fp8 else "")


def training_bytes(arch: Architecture, dtype: torch.dtype, checkpoints: int) -> int:
    """Weights, Adam's two moments and, below fp32, the fp32 main copy."""
    per_parameter = dtype.itemsize + 8 + (4 if dtype != torch.float32 else 0)
    return checkpoints * per_parameter * parameter_count(arch)
