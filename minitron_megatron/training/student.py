"""The student in training: model, data-parallel wrapper, optimizer, and its loss against the teacher's states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from minitron_megatron.config.distill import Distill, Training, TrainingRun
from minitron_megatron.data.batches import Batch
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import token_labels
from minitron_megatron.training.optimizer import make_optimizer
from minitron_megatron.training.teachers import HiddenTraining, TeacherStates


@dataclass
class Student:
    """What one process trains."""

    model: StageModel
    wrapped: list[DistributedDataParallel]
    """One for each chunk of the model."""
    optimizer: MegatronOptimizer
    loss_settings: LossSettings
    hidden: HiddenTraining | None = None

    def loss(self, teacher: TeacherStates, hidden_SBD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of weighted token losses, token count, sums for the log), on the last stage.

        The sum and the count stay apart: a mean per micro-batch would depend on micro-batch size and data parallelism.
        """
        last = self.model.last
        tied = last.output_weight() if last.output_layer.weight is None else None
        total, sums = last.output_layer(
            hidden_SBD,
            tied,
            labels=token_labels(batch),
            targets=teacher.targets(batch),
            settings=self.loss_settings,
            rows=last.valid_rows(),
        )
        tokens = (batch.loss_mask_BS > 0).sum().int()  # fractional weights go into the sum alone
        return total, tokens, {**sums, "tokens": tokens.clone()}


def make_student(model: StageModel, settings: TrainingRun, training: Training | None = None, hidden: HiddenTraining | None = None) -> Student:
    """A loaded model made ready for training; see make_optimizer."""
    wrapped, optimizer = make_optimizer(model.chunks, settings, training or Training(), finalize=partial(_finalize, hidden))
    return Student(model.train(), wrapped, optimizer, loss_settings(settings), hidden)


def loss_settings(settings: TrainingRun) -> LossSettings:
    """The recipe's losses against teachers; cross-entropy alone for what has none."""
    if not isinstance(settings, Distill):
        return LossSettings({"cross_entropy": 1.0}, chunk_tokens=settings.loss_chunk_tokens, has_teacher=False)
    weights = {str(name): weight for name, weight in settings.loss.items() if weight}
    return LossSettings(weights, settings.temperature, settings.loss_chunk_tokens)


def _finalize(hidden: HiddenTraining | None, wrapped: list[nn.Module], *arguments: Any, **keywords: Any) -> None:
    """megatron's reductions of a step's gradients, then ours."""
    finalize_model_grads(wrapped, *arguments, **keywords)
    if hidden:
        hidden.sum_shared_gradients(wrapped)


def learning_rate_schedule(optimizer: Any, settings: TrainingRun, finished_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine; set for the step after finished_steps, so that the first step has a rate above 0."""
    rate, decay = settings.learning_rate, settings.adam.weight_decay
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=rate.peak,
        min_lr=rate.minimum,
        lr_warmup_steps=rate.warmup_steps,
        lr_decay_steps=settings.steps,
        lr_decay_style="cosine",
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=settings.steps,
        wd_incr_style="constant",
    )
    schedule.step(increment=finished_steps + 1)
    return schedule
