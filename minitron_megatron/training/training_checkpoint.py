"""Checkpoints of a run in progress: weights, optimizer and how far the run has come.

They are of no layout: a run may continue under another one, and does so to the bit under the same. A checkpoint is written as
writing_N and renamed to step_N when every process's part is on disk, so whatever is called step_N is whole.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from minitron_megatron.artifact import write_json
from minitron_megatron.checkpoint.sharded import model_state, set_model_state
from minitron_megatron.errors import TrainingError
from minitron_megatron.model.fp8.weights import put_plain_values
from minitron_megatron.parallel.world import World
from minitron_megatron.platform import versions
from minitron_megatron.platform.lifetime import run_ending_with_parent
from minitron_megatron.training.optimizer import whole_parameters, write_main_into_weights
from minitron_megatron.training.optimizer_state import OptimizerState
from minitron_megatron.training.scaling_checkpoint import load_scaling, scaling_entries
from minitron_megatron.training.student import Student

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come; samples are counted one by one, so that the global batch may change between two starts."""

    step: int = 0
    samples: int = 0
    """Samples consumed: the next step begins with the sample of this id."""
    starts: tuple[dict[str, Any], ...] = ()
    """What may change between two starts: from which step on it was what."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Small tensors of other parts, equal on every process."""
    teacher: str = ""
    """Id of the artifact that teaches from here on, where it changes in the course of a run."""

    def started_with(self, **values: Any) -> Progress:
        """The same point of the run, with what holds from here on written down where it is new."""
        before = tuple(start for start in self.starts if start["step"] < self.step)
        changed = not before or before[-1] != {**values, "step": before[-1]["step"]}
        return replace(self, starts=(*before, {"step": self.step, **values}) if changed else before)

    def to_json(self) -> dict[str, Any]:
        teacher = {"teacher": self.teacher} if self.teacher else {}
        return {"step": self.step, "samples": self.samples, "starts": list(self.starts), **teacher}


class TrainingCheckpoints:
    """Writes and reads step_N below a folder; every process calls every method, in the same order.

    keep: newest checkpoints that are kept. asynchronous: a forked process writes while training goes on.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool) -> None:
        self._folder, self._world, self._keep, self._asynchronous = folder, world, keep, asynchronous
        self._under_way = AsyncCallsQueue(persistent=False)

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for what is under way; where the run failed, the other processes may not come: it is given up."""
        if kind is None:
            self.finish()
        else:
            self._give_up()

    def load(self, student: Student) -> Progress:
        """Continues from the newest whole checkpoint; the start of a run where there is none."""
        progress = newest_progress(self._folder)
        if progress.step == 0:
            return progress
        weights, folder = model_state(student.model), str(_step_folder(self._folder, progress.step))
        optimizer = OptimizerState(student.optimizer, weights, loading=True)
        state = dist_checkpointing.load({"model": weights, "optimizer": optimizer.tensors()}, folder)
        shared_out = dist_checkpointing.load(optimizer.weights(), folder) if optimizer.has_weights else {}
        set_model_state(student.model, state["model"])
        load_scaling(student.model, Path(folder))
        optimizer.load({**state["optimizer"], **shared_out}, finished_steps=progress.step)
        write_main_into_weights(student.optimizer, student.wrapped)
        return replace(progress, extra=state.get("extra", {}))

    def save(self, progress: Progress, student: Student) -> None:
        """Begins a checkpoint, once the one before is on disk; on disk itself when this returns unless asynchronous.

        Raises TrainingError where a process could not write its part.
        """
        self.finish()
        unfinished = self._new_folder(progress.step)
        with whole_parameters(student.wrapped), self._told_as_training_error():
            request = self._request(progress, student, unfinished)
            request.add_finalize_fn(lambda: self._publish(progress, unfinished))
            if self._asynchronous:
                self._under_way.schedule_async_request(_ending_with_this_process(request))
            else:
                request.execute_sync()

    def poll(self) -> None:
        """Gives a checkpoint that is on disk its name; to be called once a step. Raises TrainingError like save."""
        with self._told_as_training_error():
            self._under_way.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Waits for the checkpoint that is under way. Raises TrainingError like save."""
        with self._told_as_training_error():
            self._under_way.maybe_finalize_async_calls(blocking=True)

    def _give_up(self) -> None:
        """Ends this process's writer; the next save gets a new queue for reports, where one that is still on its way cannot arrive."""
        for call in self._under_way.async_calls:
            call.async_caller.close(abort=True)
            filesystem_async._results_queue = None
        self._under_way = AsyncCallsQueue(persistent=False)

    def _new_folder(self, step: int) -> Path:
        """Of a name of its own: on another machine the writer of a run that was killed may still be at work in the one that it left."""
        folder = self._folder / self._world.from_main(f"writing_{step:08d}_{time.time_ns():x}")
        if self._world.is_main:
            for leftover in self._folder.glob("writing_*"):
                shutil.rmtree(leftover, ignore_errors=True)
            folder.mkdir(parents=True)
        self._world.barrier()
        return folder

    def _request(self, progress: Progress, student: Student, folder: Path) -> Any:
        weights = model_state(student.model)
        optimizer = OptimizerState(student.optimizer, weights, loading=False)
        put_plain_values(weights)  # behind the optimizer's, which finds its parts by the weights themselves
        state = {"model": weights, "optimizer": optimizer.tensors(), "fp8": scaling_entries(student.model), "extra": progress.extra}
        return dist_checkpointing.save(state, str(folder), async_sharded_save=True, **versions.asynchronous_save())

    @contextmanager
    def _told_as_training_error(self) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:  # no Exception in torch's eyes; its reasons are known to the main process alone
            reasons = self._world.from_main(_reasons(error))
            raise TrainingError(f"{self._folder}: a checkpoint could not be written: {reasons}; mend that and start again") from None

    def _publish(self, progress: Progress, unfinished: Path) -> None:
        """Every process's part is on disk: the checkpoint gets its name, and those before it may go."""
        if self._world.is_main:
            write_json(unfinished / PROGRESS, progress.to_json())
            unfinished.rename(_step_folder(self._folder, progress.step))
            for old in saved_steps(self._folder)[: -self._keep]:
                shutil.rmtree(_step_folder(self._folder, old))
        self._world.barrier()


def newest_progress(folder: Path) -> Progress:
    """What the newest whole checkpoint says of itself, without its tensors; a reader needs no process group."""
    steps = saved_steps(folder)
    if not steps:
        return Progress()
    return _progress_of(_step_folder(folder, steps[-1]))


def teachers_of_checkpoints(folder: Path) -> set[str]:
    """Ids of the teachers that a run could continue with from any of its checkpoints."""
    return {_progress_of(_step_folder(folder, step)).teacher for step in saved_steps(folder)} - {""}


def _progress_of(folder: Path) -> Progress:
    saved = json.loads((folder / PROGRESS).read_text())
    return Progress(saved["step"], saved["samples"], tuple(saved["starts"]), teacher=saved.get("teacher", ""))


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def _ending_with_this_process(request: AsyncRequest) -> AsyncRequest:
    """Its writer, a forked process, does not outlive a run that is killed. A process that has nothing to write has none."""
    return request if request.async_fn is None else request._replace(async_fn=partial(run_ending_with_parent, request.async_fn))


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"process {rank}: {reason}" for rank, (reason, _) in error.failures.items())
