"""One process of one stage: `python -m minitron_megatron.worker STAGE RECIPE [key=value…]`, under torchrun or alone."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import ExitStack
from typing import NoReturn

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.artifact import Artifact, partial_folder
from minitron_megatron.chain import STAGES, Stage, finished, require_asked, run_folder, run_stage
from minitron_megatron.config.checks.depth import settled_depth
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.notes import student_notes, teacher_notes
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import LayoutError, MinitronError
from minitron_megatron.failure import LAUNCHED, STOPPED, tell
from minitron_megatron.health import require_links
from minitron_megatron.parallel.world import World, distributed_world, rank_and_size
from minitron_megatron.platform import Platform, activate
from minitron_megatron.platform.deterministic import be_deterministic
from minitron_megatron.platform.engine_needs import require_engine
from minitron_megatron.platform.fp8_support import require_fp8
from minitron_megatron.platform.fused import first_lines
from minitron_megatron.platform.lifetime import end_with_parent
from minitron_megatron.search.survey import surviving
from minitron_megatron.status import withdraw
from minitron_megatron.training.stop import SIGNALS, Stopped

RANK_LOGS = "MINITRON_RANK_LOGS"
"""Folder for the logs of the ranks behind the first."""


def prepare(recipe_path: str, overrides: list[str], *, needs_device: bool = True) -> tuple[Recipe, Platform]:
    """The recipe, checked against its model, with `auto` settled for this machine; nothing is written."""
    recipe = load_recipe(recipe_path, overrides)
    source = source_architecture(recipe.model.path, recipe.model.hf_config)
    recipe = settled_depth(recipe, source, check_recipe(recipe, source))
    if recipe.search:
        surviving(recipe, recipe.search, source)  # ahead of the hours before the search
    platform = activate(recipe.platform if needs_device else "cpu")
    if recipe.training.deterministic:
        be_deterministic(platform)
    if needs_device:
        # ahead of the hours before the first stage that trains
        require_engine(recipe, platform)
        require_fp8(recipe.fp8, platform)
    precision = recipe.precision if recipe.precision != "auto" else ("bf16" if platform.supports_bf16_matmul() else "fp32")
    return recipe.model_copy(update={"precision": precision, "platform": platform.kind}), platform


def run_here(stage: Stage, recipe: Recipe, recipe_path: str, platform: Platform, connections: ExitStack) -> Artifact | None:
    """Runs a stage in this process, with the others that the launcher started where the stage is distributed."""
    _, size = rank_and_size()
    if not stage.distributed and size > 1:
        raise LayoutError(f"stage {stage.name} is one process, but {size} were started; start it with: minitron {stage.name} {recipe_path}")
    world = World(platform)
    if stage.distributed:
        world = connections.enter_context(distributed_world(platform, recipe.parallel.timeout_seconds))
        require_links(world)
    return run_stage(stage, recipe, recipe_path, world)


def main(arguments: list[str]) -> int:
    """Exit code 0; 2 for a user's mistake, told in one line; STOPPED where it was asked to; 1 for anything else, with its traceback."""
    _die_with_the_launcher()
    _log_for_itself()
    code = 0
    with ExitStack() as connections:
        try:
            _run(connections, *arguments)
        except (KeyboardInterrupt, SystemExit):
            raise
        except Stopped as stopped:
            print(stopped, flush=True) if rank_and_size()[0] == 0 else None
            code = STOPPED
        except BaseException as error:  # torch's CheckpointException is no Exception
            tell(error)  # while the connections stand: the others fail as soon as they close, and must not have the first word
            return 2 if isinstance(error, MinitronError) else 1
        _close(connections, arguments[0])
    return code


def _close(connections: ExitStack, stage: str) -> None:
    """The stage's work is done by now: what does not close well is told and fails nothing, or the others would be ended while they publish."""
    try:
        connections.close()
    except Exception as error:
        print(f"{stage}: finished; its connections did not close well: {error}", file=sys.stderr, flush=True)


def _die_with_the_launcher() -> None:
    """A launcher that is killed takes its workers along: orphans would go on writing into the folder of the next start."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.environ.get(LAUNCHED, "")
        end_with_parent(int(launcher) if launcher.isdecimal() else None)


def _log_for_itself() -> None:
    """One log for each rank where a folder for them is named; rank 0 speaks to the console, which is the job's own log."""
    folder, rank = os.environ.get(RANK_LOGS), rank_and_size()[0]
    if folder and rank > 0:
        log = os.open(f"{folder}/rank_{rank:05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


def _run(connections: ExitStack, stage_name: str, recipe_path: str, *overrides: str) -> None:
    if stage_name not in STAGES:
        raise MinitronError(f"unknown stage '{stage_name}'; stages: {', '.join(STAGES)}")
    stage, is_main = STAGES[stage_name], rank_and_size()[0] == 0
    recipe, platform = prepare(recipe_path, list(overrides), needs_device=stage.computes)
    require_asked(stage, recipe, recipe_path)
    if finished(stage, recipe):
        if is_main:
            withdraw(partial_folder(run_folder(recipe), stage.name))
            print(f"{stage.name}: up to date", flush=True)
        return
    if is_main and stage.distributed:
        for line in [*first_lines(platform), *numbers(stage, recipe)]:
            print(f"{stage.name}: {line}", flush=True)
    artifact = run_here(stage, recipe, recipe_path, platform, connections)
    if artifact:
        print(f"{stage.name}: {artifact.result['summary']}  ({artifact.manifest['seconds']} s)", flush=True)


if __name__ == "__mp_main__":
    # a helper that megatron spawns (for the reports of checkpoints' writers) imports this first: it ends with its worker, and does not sleep on;
    # SLURM sends what asks a worker to stop to every process of a job, and the worker's last checkpoint needs this one
    end_with_parent()
    for _number in SIGNALS:
        signal.signal(_number, signal.SIG_IGN)


def numbers(stage: Stage, recipe: Recipe) -> list[str]:
    """What computes in FP8 or in a precision of its own, of the models that the stage runs."""
    teacher = teacher_notes(recipe) if {"teacher_numbers", "live_teacher_numbers"} & set(stage.sections) else []
    return teacher + (student_notes(recipe) if "student_fp8" in stage.sections else [])


def _leave(code: int) -> NoReturn:
    """Ends this process behind Python's exit handlers, ahead of the native libraries' own.

    Those sometimes abort a process whose work is done ("terminate called without an active exception": a thread of torch or gloo that still runs
    when its object goes), and the launcher takes the signal for a failure and ends the others while they publish.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
