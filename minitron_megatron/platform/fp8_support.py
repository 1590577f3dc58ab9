"""What a machine can compute in FP8: by its GPU, its CUDA and its Transformer Engine.

Read in Transformer Engine 2.11 (`check_*_support` of pytorch/quantization.py) and in megatron-core 0.16.1 and 0.19.2 (fp8_utils.py, fp4_utils.py),
which ask for the same versions of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minitron_megatron.config.fp8 import Fp8, Scaling
from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import engine, versions
from minitron_megatron.platform.activate import Platform

Version = tuple[int, ...]
ADA, HOPPER, BLACKWELL, BLACKWELL_RTX = (8, 9), (9, 0), (10, 0), (12, 0)
LEAST_ENGINE: dict[Scaling, Version] = {"delayed": (2, 0), "tensorwise": (2, 2), "blockwise": (2, 3), "mxfp8": (2, 1), "nvfp4": (2, 7)}
"""Of Transformer Engine, below which megatron-core refuses the scaling."""


@dataclass(frozen=True)
class Fp8Machine:
    """What decides; versions as numbers."""

    gpu: str
    capability: tuple[int, int]
    cuda: Version
    """That torch was built with."""
    transformer_engine: Version | None
    engine_problem: str = "absent"
    """Why there is none."""


def this_machine(platform: Platform) -> Fp8Machine:
    """Of this process's GPU."""
    gpu, capability = torch.cuda.get_device_name(platform.device), torch.cuda.get_device_capability(platform.device)
    version, cuda = engine.installed_version() if platform.transformer_engine else None, _numbers(torch.version.cuda or "0")
    return Fp8Machine(gpu, capability, cuda, versions.parse(version) if version else None, engine.import_problem() or "")


def obstacle(scaling: Scaling, machine: Fp8Machine) -> str | None:
    """Why the machine cannot compute with this scaling, with the mend; None where it can."""
    release, capability = machine.transformer_engine, machine.capability
    if capability < ADA:
        return f"{_gpu(machine)} multiplies in no FP8, which begins with Ada (sm_89) and Hopper (sm_90); leave the section fp8 out"
    if release is None:
        return f"FP8 on a GPU is Transformer Engine's ({machine.engine_problem}); install the extra gpu, or leave the section fp8 out"
    if release < LEAST_ENGINE[scaling]:
        return f"megatron-core asks for Transformer Engine {_dotted(LEAST_ENGINE[scaling])} or newer, {_dotted(release)} is installed; install 2.11.0"
    if scaling == "blockwise":
        return _of_blocks(machine)
    if scaling in ("mxfp8", "nvfp4") and capability < BLACKWELL:
        return f"{_gpu(machine)} is before Blackwell (sm_100), whose matrix units alone scale such blocks; use {_instead(machine)}"
    if scaling == "mxfp8" and capability >= BLACKWELL_RTX:
        return f"Transformer Engine multiplies mxfp8 in one layout alone on {_gpu(machine)}; use tensorwise"
    if capability < HOPPER and machine.cuda < (12, 1):
        return f"FP8 on Ada needs CUDA 12.1 or newer, torch was built with {_dotted(machine.cuda)}; use a newer torch"
    return None


def require_fp8(fp8: Fp8 | None, platform: Platform) -> None:
    """Raises PlatformError with everything that this machine cannot do of a recipe's section; to be called before a model is built."""
    if fp8 is None:
        return
    real = platform.kind == "cuda" and not fp8.emulated
    problems = obstacles(fp8, this_machine(platform)) if real else _emulation_problems(fp8, platform)
    if problems:
        raise PlatformError("\n".join(problems))


def obstacles(fp8: Fp8, machine: Fp8Machine) -> list[str]:
    """Of both models."""
    asked = {"teacher": fp8.of_teacher, "student": fp8.of_student}
    found = {f"fp8.{whose}={model.scaling}": obstacle(model.scaling, machine) for whose, model in asked.items() if model}
    return [f"{what}: {why}" for what, why in found.items() if why]


def _emulation_problems(fp8: Fp8, platform: Platform) -> list[str]:
    if platform.kind == "cpu":
        scaling = " with another scaling than nvfp4" if "nvfp4" in (fp8.teacher, fp8.student) else ""
        mend = f"set fp8.emulated=true{scaling}, which rounds as FP8 would, or leave the section out"
        return [] if fp8.emulated else [f"fp8: this process runs on a CPU, which multiplies in no FP8; {mend}"]
    if not platform.transformer_engine:
        return []
    mend = "set fp8.emulated=false, or platform=cpu"
    return [f"fp8.emulated=true rounds around megatron's local layers, and with Transformer Engine its own layers are used here; {mend}"]


def _of_blocks(machine: Fp8Machine) -> str | None:
    if machine.capability < HOPPER:
        return f"{_gpu(machine)} is before Hopper (sm_90), whose matrix units alone add up scaled blocks; use tensorwise"
    if machine.cuda < (12, 9):
        return f"blockwise products came with CUDA 12.9, torch was built with {_dotted(machine.cuda)}; use a newer torch, or tensorwise"
    return None


def _instead(machine: Fp8Machine) -> str:
    return "tensorwise" if _of_blocks(machine) else "blockwise or tensorwise"


def _gpu(machine: Fp8Machine) -> str:
    return f"{machine.gpu} (sm_{machine.capability[0]}{machine.capability[1]})"


def _numbers(version: str) -> Version:
    return tuple(int(part) for part in version.split(".")[:2])


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
