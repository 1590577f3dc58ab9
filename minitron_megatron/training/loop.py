"""The training loop of every stage that trains: teachers' schedules, student's schedule, optimizer; no barrier between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.config.distill import TrainingRun
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.batches import Batch, MicroBatches, TokenDataset, collate, micro_batches
from minitron_megatron.errors import TrainingError
from minitron_megatron.model.fp8.state import unmoved_scaling
from minitron_megatron.model.run import batches_of_rank, forward_backward, forward_only
from minitron_megatron.model.user_buffers import user_buffers, without_buffers
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.world import World
from minitron_megatron.status import StepStatus
from minitron_megatron.training.metrics import MetricsLog, console_line, validation_line
from minitron_megatron.training.optimizer import whole_parameters
from minitron_megatron.training.stop import Stopped, StopRequest, deferred
from minitron_megatron.training.student import Student, learning_rate_schedule
from minitron_megatron.training.sums import Sums, WindowSums
from minitron_megatron.training.teachers import HiddenTraining, Load, Teachers, TeacherStates
from minitron_megatron.training.training_checkpoint import Progress, TrainingCheckpoints, newest_progress


@dataclass
class TrainingLoop:
    """Everything one process holds during the run; stage: the section of the recipe that asks for it."""

    stage: str
    settings: TrainingRun
    layout: Layout
    world: World
    teachers: Teachers
    student: Student
    training: TokenDataset
    heldout: TokenDataset
    progress: Progress = field(default_factory=Progress)
    saved: Callable[[Progress], None] | None = None
    """Called on every process behind each checkpoint, with the student's weights whole."""
    pause_after_steps: int | None = None
    """Where this start ends; None: where the run does."""
    stop: StopRequest = field(default_factory=StopRequest)
    stopping: bool = False
    """Whether any process had been asked to stop by the last step: the same on all."""
    wishes: Tensor | None = None
    """How many of them, of the last step; left on the device until the step's losses are fetched."""
    window_losses: dict[str, list[float | None]] = field(default_factory=dict)
    """Of the last validation, by loss: mean over the tokens of each held-out window; None where none of its tokens counts."""

    @property
    def last_step(self) -> int:
        """Of this start."""
        paused = self.pause_after_steps
        return self.settings.steps if paused is None else min(paused, self.settings.steps)

    def run(self, folder: Path, recipe: Recipe) -> dict[str, float]:
        """Trains to the last step from the newest checkpoint in the folder; returns the validation after it. Raises Stopped where it was asked to."""
        buffers = user_buffers(self.student.model, samples=self.settings.micro_batch, sequence=self.settings.sequence_length)
        with self.stop.listening(), buffers:
            with self._checkpoints(folder / "training", recipe) as checkpoints:
                last = self._train(checkpoints, folder, recipe)
            if self.stopping and self.progress.step < self.last_step:
                step, steps = self.progress.step, self.settings.steps
                if self.world.is_main:
                    StepStatus(folder, steps).saved(step, "it was asked to stop")
                raise Stopped(f"{self.stage}: asked to stop: saved behind step {step} of {steps}; the next start goes on from there")
            return last

    def _train(self, checkpoints: TrainingCheckpoints, folder: Path, recipe: Recipe) -> dict[str, float]:
        self.progress = checkpoints.load(self.student).started_with(**self._changeable())
        self.student.load_balances(self.progress.extra)
        finished = self.progress.step
        log = self._open_log(folder, finished, recipe)
        schedule = learning_rate_schedule(self.student.optimizer, self.settings, finished)
        last = self.validate()
        if finished and self.world.is_main:
            print(f"{self.stage}: continues behind step {finished} of {self.settings.steps}", flush=True)
        if finished == 0:
            self._log(log, {"step": 0, "steps": self.settings.steps, "validation": last})
        status = StepStatus(folder, self.settings.steps) if self.world.is_main else None
        started = time.monotonic()
        for step in range(finished, self.last_step):
            record = self._step(step)
            schedule.step(increment=1)
            if self._is_due(step + 1, self.settings.validate_every_steps):
                last = record["validation"] = self.validate()
            seconds_a_step = (time.monotonic() - started) / (step + 1 - finished)
            self._log(log, record, seconds_a_step)
            checkpoints.poll()
            if status:
                status.step(step + 1, lambda: newest_progress(folder / "training").step)
            if self.stopping or self._is_due(step + 1, self.settings.save_every_steps):
                with deferred():
                    self._save(checkpoints)
            if self.stopping:
                break
        if log:
            log.close()
        return last

    def validate(self) -> dict[str, float]:
        """Losses and perplexity on held-out samples, equal on every process."""
        windows: MicroBatches = [(window,) for window in range(len(self.heldout))]
        load = self._loader(self.heldout)
        teachers = self.teachers.states(windows, load)
        batches = batches_of_rank(windows, load, self.layout)
        with whole_parameters(self.student.wrapped):
            logged = self._forward_only(teachers, batches)
        windows_sums = self._over_windows(logged)
        self.window_losses = windows_sums.means()
        means = windows_sums.total().means()
        return {**means, "perplexity": math.exp(min(means["cross_entropy"], 700))}

    def _save(self, checkpoints: TrainingCheckpoints) -> None:
        """The next step's teacher is settled first: a run that continues from here has the same. Behind the last step the one that taught stays."""
        if self.progress.step < self.settings.steps:
            self.teachers.renew()
        checkpoints.save(replace(self.progress, extra=self.student.balances(), teacher=self.teachers.identity), self.student)
        if self.saved:
            checkpoints.finish()  # megatron's writers of one process share a queue: what saved writes would get the checkpoint's answers
            with whole_parameters(self.student.wrapped):
                self.saved(self.progress)

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step over the global batch; the record of it."""
        began, student, hidden = time.monotonic(), self.student, self.student.hidden
        load = self._loader(self.training)
        groups = micro_batches(self.progress.samples, global_batch=self.settings.global_batch, micro_batch=self.settings.micro_batch)
        student.begin_step(step)
        if not student.is_balanced:
            measured = self._measure(hidden, groups, load)
            student.rebalance(measured)
            student.begin_step(step)
            student.rebalance(measured)  # once more: α follows the losses at their weights, which are known only now
        alpha = hidden.balance.alpha if hidden else None
        for chunk in student.wrapped:
            chunk.zero_grad_buffer()
        student.optimizer.zero_grad()
        sums = self._forward_backward(groups, load)
        student.rebalance(sums)
        rate = student.optimizer.param_groups[0]["lr"]
        _, gradient_norm, _ = student.optimizer.step()
        losses = sums.means()
        self.stopping = bool(self.wishes)
        loss = student.weighted(losses)
        if alpha is not None:
            losses["alpha"] = float(alpha)
            loss += losses["alpha"] * losses["hidden"]
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise TrainingError(
                f"{self.stage}: step {step + 1} has loss {loss} and gradient norm {float(gradient_norm)}; "
                f"lower {self.stage}.learning_rate.peak, or look at the perplexity of the model that it began with"
            )
        self.progress = replace(self.progress, step=step + 1, samples=self.progress.samples + self.settings.global_batch)
        seconds = time.monotonic() - began
        return {
            "step": step + 1,
            "steps": self.settings.steps,
            "loss": loss,
            **losses,
            **student.moving_weights(),
            "gradient_norm": float(gradient_norm),
            "learning_rate": rate,
            "tokens_per_second": self.settings.global_batch * self.settings.sequence_length / seconds,
            "memory_gib": self.world.platform.peak_memory_bytes() / 2**30,
            "seconds": seconds,
            **({"teacher": self.teachers.identity} if self.teachers.identity else {}),
        }

    def _forward_backward(self, groups: MicroBatches, load: Load) -> Sums:
        """Teachers, then student; the step's sums."""
        student, hidden = self.student, self.student.hidden
        teacher = self.teachers.states(groups, load, hidden.wanted if hidden else ())
        batches = batches_of_rank(groups, load, self.layout)
        with hidden.training() if hidden else nullcontext():
            before = partial(hidden.expect, teacher) if hidden else None
            logged = forward_backward(student.model, student.wrapped, batches, partial(student.loss, teacher), before=before)
        return self._over_processes(logged, hidden)

    def _forward_only(self, teacher: TeacherStates, batches: list[Batch], hidden: HiddenTraining | None = None) -> list[dict[str, Tensor]]:
        """The student's losses without gradients; those of hidden states too where they are asked for."""
        model = self.student.model.eval()
        with hidden.measuring() if hidden else nullcontext(), without_buffers(model), unmoved_scaling(model):
            before = partial(hidden.expect, teacher) if hidden else None
            logged = forward_only(model, batches, before=before, consume=lambda states, batch: self.student.loss(teacher, states, batch)[2])
        model.train()
        return logged

    def _measure(self, hidden: HiddenTraining | None, groups: MicroBatches, load: Load) -> Sums:
        """What the first weights follow: forward only, over the whole global batch; fewer samples would be others in another layout."""
        teacher = self.teachers.states(groups, load, hidden.wanted if hidden else ())
        batches = batches_of_rank(groups, load, self.layout)
        with whole_parameters(self.student.wrapped):
            logged = self._forward_only(teacher, batches, hidden)
        return self._over_processes(logged, hidden)

    def _loader(self, dataset: TokenDataset) -> Load:
        """Sample ids → batch on the device; teacher and student of a step share those that both want.

        Its sample ids stay on the host: states are put away and found by them at every micro-batch, which must not wait for the device.
        """

        def load(ids: tuple[int, ...]) -> Batch:
            batch = collate(dataset, ids)
            return replace(batch.to(self.world.platform.device), sample_ids_B=batch.sample_ids_B)

        return cache(load)

    def _over_processes(self, logged: list[dict[str, Tensor]], hidden: HiddenTraining | None = None) -> Sums:
        """Adds up what the processes logged."""
        names = self._names
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.world.platform.device)
        if self.layout.is_last_stage and self.layout.tensor_rank == 0:  # its tensor ranks hold equal sums, one speaks
            for item in logged:
                sums += torch.stack([item[name].double() for name in names])
        if hidden:
            sums = torch.cat([sums, hidden.take_sums()])
        asked = sums.new_full((1,), float(self.stop.asked))  # by the way: no collective of its own
        sums = torch.cat([sums, asked])
        dist.all_reduce(sums)
        self.wishes = sums[-1]
        return Sums(names, sums[:-1])

    def _over_windows(self, logged: list[dict[str, Tensor]]) -> WindowSums:
        """Gathers what the processes logged of the held-out windows."""
        names = self._names
        sums_WN = torch.zeros(len(self.heldout), len(names), dtype=torch.float64, device=self.world.platform.device)
        if self.layout.is_last_stage and self.layout.tensor_rank == 0:
            for window, item in zip(range(self.layout.data_rank, len(self.heldout), self.layout.data), logged, strict=True):
                sums_WN[window] = torch.stack([item[name].double() for name in names])
        dist.all_reduce(sums_WN)
        return WindowSums(names, sums_WN)

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self.student.loss_settings.names, "tokens")

    def _checkpoints(self, folder: Path, recipe: Recipe) -> TrainingCheckpoints:
        asynchronous = recipe.training.asynchronous_checkpoints
        return TrainingCheckpoints(folder, self.world, keep=self.settings.keep_checkpoints, asynchronous=asynchronous)

    def _changeable(self) -> dict[str, Any]:
        """What may be another at the next start of the same run."""
        named = ("steps", "global_batch", "micro_batch", "loss_memory_mib", "loss_chunk_tokens")
        return {"layout": self.layout.describe(), **{name: getattr(self.settings, name) for name in named}}

    def _is_due(self, finished: int, every: int) -> bool:
        return finished % every == 0 or finished == self.last_step

    def _log(self, log: MetricsLog | None, record: dict[str, Any], seconds_a_step: float = 0.0) -> None:
        """Every step goes into the files, one in twenty and every validation on the console."""
        if log is None:
            return
        step, steps = record["step"], record["steps"]
        log.write(record)
        if step == 1 or (step and step % max(1, steps // 20) == 0):
            print(console_line(self.stage, record, seconds_a_step * (steps - step)), flush=True)
        if "validation" in record:
            log.write_windows({"step": step, **self.window_losses})
            print(validation_line(step, record["validation"]), flush=True)

    def _open_log(self, folder: Path, finished: int, recipe: Recipe) -> MetricsLog | None:
        if not self.world.is_main:
            return None
        return MetricsLog(folder, finished_steps=finished, wandb=self.settings.wandb, run_name=recipe.name)
