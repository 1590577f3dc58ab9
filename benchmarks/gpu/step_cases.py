"""One precision of step.py in this process: every sequence length, depth and side, a line of JSON for each as soon as it is measured."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from clock import GIB, failed, measured, release, reset_peak
from kernel_classes import by_class, profiled
from options import one_process
from planned import H200, TOKENS_OF_A_STEP, memory_of, most_layers, plan_of, settings_of, step_flops
from shapes import Precision, precision, shapes

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Distill

OURS, TEACHER, STUDENT, PEER = "distillation", "teacher alone", "student alone", "ModelOpt"
KEPT_FREE_GIB = 4
"""Of the card, for fragments; CUDA's context is already off what is free."""


def measure_all(asked: argparse.Namespace) -> None:
    chosen, models = precision(asked.one, emulated=asked.device == "cpu"), shapes(tiny=asked.tiny)
    with one_process(asked.device) as (world, layout):
        for sequence in asked.sequences:
            sizes = {"micro_batch": asked.micro_batch, "loss_memory_mib": asked.loss_memory_mib}
            settings = settings_of(sequence, tokens=4 * sequence if asked.tiny else TOKENS_OF_A_STEP, **sizes)
            for layers in asked.layers or depths(models.teacher, models.width, settings, chosen, world):
                pair = models.teacher.resized(layers=layers), models.width.resized(layers=layers)
                of_case(pair, settings, chosen, world, layout, asked)


def depths(teacher: Architecture, student: Architecture, settings: Distill, chosen: Precision, world: Any) -> list[int]:
    """All layers where they fit; else half of what fits, and what fits."""
    free = world.platform.free_memory_bytes() - KEPT_FREE_GIB * GIB
    most = most_layers(teacher, student, settings, chosen, free)
    return [most] if most == teacher.layers else sorted({max(1, most // 2), most})


def of_case(pair: tuple[Architecture, Architecture], settings: Distill, chosen: Precision, world: Any, layout: Any, asked: Any) -> None:
    from models import modelopt_step, our_step, student_step, teacher_step

    teacher, student = pair
    where = (world, layout, settings, chosen)
    sides: dict[str, Callable[[], Any]] = {
        OURS: partial(our_step, teacher, student, *where),
        TEACHER: partial(teacher_step, teacher, *where),
        STUDENT: partial(student_step, student, *where),
    }
    if not asked.no_peer and importlib.util.find_spec("modelopt"):
        sides[PEER] = partial(modelopt_step, teacher, student, *where)
    plan = plan_of(teacher, student, settings, chosen)
    known = {
        "precision": chosen.name,
        "sequence": settings.sequence_length,
        "micro_batch": settings.micro_batch,
        "loss_memory_mib": settings.loss_memory_mib,
        "layers": teacher.layers,
        "tokens": settings.global_batch * settings.sequence_length,
        "planned_gib": memory_of(plan).total / GIB,
        "model_flops": step_flops(plan),
        "peaks": H200.gpu.flops,
    }
    for side, make in sides.items():
        found = attempted(make, world.platform, asked, profile=asked.profile and side in (OURS, PEER))
        print(json.dumps({**known, "side": side, **found}), flush=True)


def attempted(make: Callable[[], Any], platform: Any, asked: Any, *, profile: bool) -> dict[str, Any]:
    """Built, measured and given back; where it fails, why: the other cases go on. before_gib: held ahead of it, which should be nothing on a GPU."""
    before = {"before_gib": reset_peak(platform) / GIB}
    try:
        step = make()
        found: dict[str, Any] = measured(step, platform, runs=asked.runs if not asked.tiny else 1, warm_up=1 if asked.tiny else 2).to_dict()
        if profile:
            found["profile"] = by_class(profiled(step, asked.device))
    except Exception as error:
        found = dict(failed(error))
    step = None
    release(platform)
    return {**before, **found}
