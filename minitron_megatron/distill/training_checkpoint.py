"""Checkpoints of a run in progress: weights, optimizer and step, so that it continues to the bit where it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron.core import dist_checkpointing

from minitron_megatron.checkpoint.sharded import model_state, save_state, set_model_state
from minitron_megatron.distill.student import Student
from minitron_megatron.parallel.world import World


def save_training(folder: Path, step: int, student: Student, world: World, *, keep: int) -> None:
    """Writes step_N below the folder; it has its name only once it is whole. Older ones beyond `keep` are removed."""
    unfinished, final = folder / f"writing_{step:08d}", folder / f"step_{step:08d}"
    if world.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.barrier()
    model = model_state(student.model)
    save_state({"model": model, "optimizer": student.optimizer.sharded_state_dict(model), "step": step}, unfinished)
    world.barrier()
    if world.is_main:
        unfinished.rename(final)
        for old in saved_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step_{old:08d}")
    world.barrier()


def load_training(folder: Path, student: Student) -> int:
    """Continues from the newest whole checkpoint; returns the number of finished steps, 0 where there is none."""
    steps = saved_steps(folder)
    if not steps:
        return 0
    model = model_state(student.model)
    wanted = {"model": model, "optimizer": student.optimizer.sharded_state_dict(model, is_loading=True)}
    state = dist_checkpointing.load(wanted, str(folder / f"step_{steps[-1]:08d}"))
    set_model_state(student.model, state["model"])
    student.optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))
