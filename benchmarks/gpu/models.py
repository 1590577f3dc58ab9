"""Teacher and student with random weights in one process: our distillation, the parts that it is measured against, and ModelOpt's step.

Legend: D hidden, E teacher's hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from shapes import Precision
from step_plain import PlainGPT, TeacherAlone, cross_entropy, trained
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Distill, Training
from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.data.batches import Batch, collate, micro_batches
from minitron_megatron.distill.exchange import Exchange
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.distill.teachers import Teachers
from minitron_megatron.model.build import build_model, mark_shards, transformer_config
from minitron_megatron.model.fp8.weights import INITIAL_VALUE
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.split import distillation_work, logits_work
from minitron_megatron.parallel.world import World
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import make_student

WEIGHTS = torch.bfloat16


class RandomTokens:
    """A TokenDataset without an end: of a few samples, again and again."""

    def __init__(self, length: int, vocab: int, samples: int = 16) -> None:
        self._samples = torch.randint(vocab, (samples, length + 1), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, sample_id: int) -> Tensor:
        return self._samples[sample_id % len(self._samples)]


@torch.no_grad()
def randomized(model: StageModel) -> StageModel:
    """Matrices of a small standard deviation; norms stay at 1. FP8 weights round for themselves what is copied into them."""
    for weight in model.parameters():
        if weight.dim() > 1:
            value = 0.02 * torch.randn(weight.shape, dtype=weight.dtype, device=weight.device)
            weight.copy_(value)
            if hasattr(weight, INITIAL_VALUE):  # what the main copy of an FP8 weight begins with
                setattr(weight, INITIAL_VALUE, value.cpu())
    return model


def frozen_model(arch: Architecture, world: World, layout: Layout, fp8: ModelFp8 | None, **more: Any) -> StageModel:
    return randomized(build_model(arch, layout, world.platform, WEIGHTS, fp8=fp8, **more))


def our_step(
    teacher: Architecture, student: Architecture, world: World, layout: Layout, settings: Distill, precision: Precision
) -> Callable[[], Any]:
    """A step as the training loop takes it, teacher's states, loss and optimizer included; returns its record."""
    frozen = frozen_model(teacher, world, layout, precision.teacher, output_layer=None)
    weight_VE = 0.02 * torch.randn(teacher.vocab, teacher.hidden, dtype=WEIGHTS, device=world.platform.device)
    exchange, budget = Exchange(layout, layout, dist.new_group(), world.platform.device), settings.handover_device_gib * 2**30
    members = Teachers([Teacher(frozen, layout, weight_VE, exchange, budget, world.platform)])
    ends = distillation_work(student, teacher)
    output = DistillationOutputLayer
    model = build_model(student, layout, world.platform, WEIGHTS, output_layer=output, ends=ends, trainable=True, fp8=precision.student)
    made, tokens = make_student(randomized(model), settings, Training()), RandomTokens(settings.sequence_length, student.vocab)
    loop, steps = TrainingLoop("distill", settings, layout, world, members, made, tokens, tokens), iter(range(1 << 40))
    return lambda: loop._step(next(steps))


def teacher_step(teacher: Architecture, world: World, layout: Layout, settings: Distill, precision: Precision) -> Callable[[], Any]:
    """Forward with the output layer, as a teacher alone would run."""
    alone = TeacherAlone.of(_plain(teacher, world, layout, precision.teacher, trainable=False))
    given = batches(settings, teacher.vocab, world)
    return lambda: alone.step(given)


def student_step(student: Architecture, world: World, layout: Layout, settings: Distill, precision: Precision) -> Callable[[], Any]:
    """A training step with megatron's own output layer and cross-entropy, optimizer included."""
    plain = trained(_plain(student, world, layout, precision.student), settings, cross_entropy)
    given = batches(settings, student.vocab, world)
    return lambda: plain.step(given)


def modelopt_step(
    teacher: Architecture, student: Architecture, world: World, layout: Layout, settings: Distill, precision: Precision
) -> Callable[[], Any]:
    """ModelOpt's distillation of the same layers, KL on whole logits; nvidia-modelopt must be installed."""
    from step_peer import peers_step

    models = [_plain(arch, world, layout, fp8) for arch, fp8 in ((student, precision.student), (teacher, precision.teacher))]
    peer, given = peers_step(*models, settings), batches(settings, student.vocab, world)
    return lambda: peer.step(given)


def batches(settings: Distill, vocab: int, world: World) -> list[Batch]:
    """The micro-batches of a step, on the device."""
    tokens = RandomTokens(settings.sequence_length, vocab)
    groups = micro_batches(0, global_batch=settings.global_batch, micro_batch=settings.micro_batch)
    return [collate(tokens, samples).to(world.platform.device) for samples in groups]


def _plain(arch: Architecture, world: World, layout: Layout, fp8: ModelFp8 | None, *, trainable: bool = True) -> StageModel:
    """megatron's own GPTModel, built as ours is: one that is not trained without gradients, or FP8 weights would have a transposed copy."""
    with torch.set_grad_enabled(trainable):
        config = transformer_config(arch, layout, world.platform, WEIGHTS, ends=logits_work(arch), fp8=fp8)
        chunk = PlainGPT(arch, layout, config, ColumnParallelLinear, 0).to(world.platform.device)
        mark_shards(chunk)
        return randomized(StageModel(arch, layout, [chunk]))
