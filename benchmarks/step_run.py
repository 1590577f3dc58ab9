"""All that takes turns in one process of a layout: our training loop, the plain models, the peer's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_plain import TeacherAlone, Trained, cross_entropy, plain_model, trained
from step_points import of_distillation, of_trained, simulated
from step_shapes import LAYOUTS, OURS, PEER, SETTINGS, STUDENT, STUDENT_ALONE, TEACHER, TEACHER_ALONE, WHOLE_TEACHER, WITH_PEER

from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.distill import Training
from minitron_megatron.config.parallel import TeacherParallel
from minitron_megatron.data.batches import Batch, collate, micro_batches
from minitron_megatron.data.shared import shared_samples
from minitron_megatron.distill.teacher import load_teacher
from minitron_megatron.distill.teachers import Teachers
from minitron_megatron.model.build import build_model
from minitron_megatron.parallel.layout import Layout, global_layout, teacher_layout
from minitron_megatron.parallel.split import EndWork, distillation_work, hidden_state_work, logits_work
from minitron_megatron.parallel.world import World
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.metrics import MetricsLog
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import make_student

ENDS = {"teacher": logits_work(TEACHER), "student": distillation_work(STUDENT), "both": distillation_work(STUDENT, TEACHER)}
"""Each model's layers are dealt out for what it has to do."""


class Run:
    """The steps of this process, by name; each trains on, from the same weights."""

    def __init__(self, name: str, folder: Path, world: World) -> None:
        parallel = LAYOUTS[name]
        self.folder, self.world, self.layout = folder, world, global_layout(parallel, world)
        self.frozen_layout = teacher_layout(TeacherParallel(tensor=parallel.tensor, pipeline=parallel.pipeline), world, self.layout)
        self.samples = shared_samples(world, folder / "train", samples=1000, sequence_length=SETTINGS.sequence_length, seed=1, cache=folder / "cache")
        self.losses: dict[str, float] = {}
        self.loop = self._loop(self.frozen_layout)
        self.steps: dict[str, Callable[[], Any]] = {
            OURS: self._ours(OURS, self.loop),
            TEACHER_ALONE: self._teacher_alone(),
            STUDENT_ALONE: self._training(STUDENT_ALONE, trained(self._plain("student", ENDS["student"]), SETTINGS, cross_entropy)),
        }
        self.points = {OURS: partial(of_distillation, self.loop, self._batches(0)[0])}
        if name == WITH_PEER:
            from step_peer import peers_step  # last: nothing that it may change is there for the others

            whole = self._loop(teacher_layout(TeacherParallel(), world, self.layout))
            self.steps[WHOLE_TEACHER] = self._ours(WHOLE_TEACHER, whole)
            self.points[WHOLE_TEACHER] = partial(of_distillation, whole, self._batches(0)[0])

            # the split of ours: one stage has both models' work of a micro-batch there, too
            models = self._plain("student", ENDS["both"]), self._plain("teacher", hidden_state_work(TEACHER))
            peer = peers_step(*models, SETTINGS)
            self.steps[PEER] = self._training(PEER, peer)
            self.points[PEER] = partial(of_trained, peer, self._batches(0)[0], STUDENT.hidden + TEACHER.hidden)

    def findings(self) -> dict[str, Any]:
        """Mean loss of each first step, over the same samples with the same weights; the simulated step from the measured passes."""
        return {"losses": self.losses, "simulated": {name: simulated(measure(), self.layout) for name, measure in self.points.items()}}

    def _loop(self, frozen: Layout) -> TrainingLoop:
        where, world = self.folder / "teacher", self.world
        source = MegatronSource(where, TEACHER)
        teacher = load_teacher(source, where, frozen, self.layout, world.platform, torch.float32, budget_bytes=1e9)
        ends = ENDS["both"]
        model = build_model(STUDENT, self.layout, world.platform, torch.float32, output_layer=DistillationOutputLayer, ends=ends, trainable=True)
        load_model(model, self.folder / "student")
        student = make_student(model, SETTINGS, Training())
        return TrainingLoop("distill", SETTINGS, self.layout, world, Teachers([teacher]), student, self.samples, self.samples)

    def _ours(self, name: str, loop: TrainingLoop) -> Callable[[], None]:
        """A step as the loop takes it: its samples read, its losses added up and logged."""
        steps = count()
        log = MetricsLog(self.folder / "log", finished_steps=0, wandb=None, run_name="step") if self.world.is_main else None

        def step() -> None:
            record = loop._step(next(steps))
            if log:
                log.write(record)
            self.losses.setdefault(name, record["forward_kl"])
            self.losses.setdefault(f"{name}: cross-entropy", record["cross_entropy"])

        return step

    def _teacher_alone(self) -> Callable[[], None]:
        teacher, batches = TeacherAlone.of(self._plain("teacher", ENDS["teacher"])), self._batches(0)
        return lambda: teacher.step(batches)

    def _training(self, name: str, step: Trained) -> Callable[[], None]:
        """On batches that are there before the clock starts."""
        batches = self._batches(0)

        def run() -> None:
            sums = torch.zeros((), dtype=torch.float64)
            for logged in step.step(batches):
                sums += logged["loss"].double()
            if name not in self.losses:
                dist.all_reduce(sums, op=dist.ReduceOp.MAX)  # the other stages have none, the other tensor ranks the same
                self.losses[name] = float(sums) / (SETTINGS.global_batch * SETTINGS.sequence_length)

        return run

    def _plain(self, kind: str, ends: EndWork) -> Any:
        arch, layout = (TEACHER, self.frozen_layout) if kind == "teacher" else (STUDENT, self.layout)
        return plain_model(arch, layout, self.world.platform, self.folder / kind, ends)

    def _batches(self, first: int) -> list[Batch]:
        groups = micro_batches(first, global_batch=SETTINGS.global_batch, micro_batch=SETTINGS.micro_batch)
        return [collate(self.samples, ids) for ids in groups]
