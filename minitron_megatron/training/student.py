"""The student in training: model, data-parallel wrapper, optimizer, and its loss against the teacher's states."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from minitron_megatron.training.losses.weights import LossWeights
from minitron_megatron.training.optimizer import make_optimizer
from minitron_megatron.training.sums import Sums
from minitron_megatron.training.teachers import HiddenTraining, TeacherStates


@dataclass
class Student:
    """What one process trains."""

    model: StageModel
    wrapped: list[DistributedDataParallel]
    """One for each chunk of the model."""
    optimizer: MegatronOptimizer
    loss_settings: LossSettings
    """Of the step that begin_step was told."""
    hidden: HiddenTraining | None = None
    weights: LossWeights | None = None
    """Of the losses, where a recipe has some."""

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

    def begin_step(self, step: int) -> None:
        """step: counted from 0."""
        if self.weights:
            self.loss_settings = replace(self.loss_settings, weights=self.weights.at(step))

    @property
    def is_balanced(self) -> bool:
        """False until the first losses are known where a weight follows one."""
        return (self.hidden is None or self.hidden.balance.is_set) and (self.weights is None or self.weights.is_set)

    def rebalance(self, sums: Sums) -> None:
        """Weights of the next step that follow this one's losses; tensors only, so that nothing waits for the device."""
        settings, by_objective = self.loss_settings, {name: sums.of(name) for name in self.loss_settings.objective}
        if self.weights:
            self.weights.update(settings.weights, dict(zip(settings.weights, by_objective.values(), strict=True)))
        if self.hidden:
            self.hidden.balance.update(settings.total(by_objective, without=("cross_entropy",)), sums.hidden)

    def weighted(self, means: dict[str, float]) -> float:
        """The loss of this step from its losses by name."""
        weights = {name: float(weight) for name, weight in self.loss_settings.weights.items()}
        return float(replace(self.loss_settings, weights=weights).total(means))

    def moving_weights(self) -> dict[str, float]:
        """For the log: those of this step that are not the same at every one."""
        return {f"weight_{name}": float(self.loss_settings.weights[name]) for name in (self.weights.moving if self.weights else ())}

    def balances(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {**(self.hidden.balance.state_dict() if self.hidden else {}), **(self.weights.state_dict() if self.weights else {})}

    def load_balances(self, state: dict[str, Tensor]) -> None:
        if self.hidden and state:
            self.hidden.balance.load_state_dict(state)
        if self.weights:
            self.weights.load_state_dict(state)


def make_student(model: StageModel, settings: TrainingRun, training: Training | None = None, hidden: HiddenTraining | None = None) -> Student:
    """A loaded model made ready for training; see make_optimizer."""
    wrapped, optimizer = make_optimizer(model.chunks, settings, training or Training(), finalize=partial(_finalize, hidden))
    weights = LossWeights(settings.loss, run_steps=settings.steps, device=next(model.parameters()).device) if isinstance(settings, Distill) else None
    return Student(model.train(), wrapped, optimizer, loss_settings(settings, weights), hidden, weights)


def loss_settings(settings: TrainingRun, weights: LossWeights | None) -> LossSettings:
    """The recipe's losses against teachers, as they are at the first step; cross-entropy alone for what has none."""
    chunk_tokens, memory_bytes = settings.loss_chunk_tokens, settings.loss_memory_mib << 20
    if not isinstance(settings, Distill) or weights is None:
        return LossSettings({"cross_entropy": 1.0}, chunk_tokens=chunk_tokens, memory_bytes=memory_bytes, has_teacher=False)
    return LossSettings(weights.at(0), settings.temperature, chunk_tokens, memory_bytes, settings.top_k)


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
