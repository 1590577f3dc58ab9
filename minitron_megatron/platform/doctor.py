"""What this machine has, and what follows from it for this tool; reads, never imports megatron.core, never raises."""

from __future__ import annotations

import importlib.util
import os
import platform as python_platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import engine, fused, versions
from minitron_megatron.platform.activate import cpu_flags

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
GB = 10**9
BF16_BYTES = 2  # per parameter, as are the next two
SAVED_TRAINING_BYTES = 14  # bf16 weight, fp32 copy, two Adam moments
TRAINING_BYTES = 18  # the same and an fp32 gradient
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0, Blackwell 10.0 and 12.0
COMMAND_SECONDS = 0.7  # a hanging slurmctld must not hang the doctor
CONTAINER_RUNTIMES = ("docker", "podman", "apptainer", "singularity", "enroot", "buildah")


@dataclass(frozen=True)
class Finding:
    """One thing looked for. ok is False where the tool refuses or loses something because of it, as `follows` says.

    broken: nothing that this machine is there for can run before it is mended; doctor's exit code tells, for a container's health check.
    """

    name: str
    found: str
    follows: str
    ok: bool
    broken: bool = False


def inspect_machine() -> list[Finding]:
    """Everything that decides what this tool can do here, in the order of its importance; takes under 3 seconds."""
    return [*(_without_raising(name, inspect) for name, inspect in _inspections().items()), *_fused_paths()]


def exit_code(findings: list[Finding]) -> int:
    """1 where one of them is broken, else 0: a machine without a GPU is in order, one whose GPUs torch cannot use is not."""
    return int(any(finding.broken for finding in findings))


def doctor_table(findings: list[Finding]) -> Table:
    """The findings as a table for the console."""
    from rich.table import Table

    table = Table(title="minitron doctor", show_lines=False)
    for column in ("", "part", "found", "what follows"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "[red]broken[/]" if finding.broken else "[green]ok[/]" if finding.ok else "[yellow]--[/]"
        table.add_row(mark, finding.name, _plain(finding.found), _plain(finding.follows))
    return table


def _inspections() -> dict[str, Callable[[str], Finding]]:
    return {
        "Python": _python,
        "torch": _torch,
        "megatron-core": _megatron_core,
        "GPU": _gpu,
        "NCCL": _nccl,
        "Transformer Engine": _transformer_engine,
        "apex": _apex,
        "FP8": _fp8,
        "CPU": _cpu,
        "memory": _memory,
        "disk": _disk,
        "SLURM": _slurm,
        "containers": _containers,
    }


def _without_raising(name: str, inspect: Callable[[str], Finding]) -> Finding:
    try:
        return inspect(name)
    except Exception as error:  # a broken driver or a strange /proc is a finding, not a crash
        return Finding(name, f"could not be read: {type(error).__name__}: {error}", "treated as absent", ok=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich would read it as markup


def _python(name: str) -> Finding:
    version = python_platform.python_version()
    if sys.version_info >= (3, 12):
        return Finding(name, version, "runs", ok=True)
    follows = "runs; megatron-core stays at 0.16.1 (0.17 and later need 3.12)"
    return Finding(name, version, follows, ok=True)


def _torch(name: str) -> Finding:
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    follows = "can use CUDA" if torch.version.cuda else "CPU over gloo only; for GPUs install a CUDA build of torch"
    return Finding(name, f"{torch.__version__} ({build})", follows, ok=True)


def _megatron_core(name: str) -> Finding:
    try:
        version = versions.installed()
    except PlatformError as error:
        return Finding(name, "absent", str(error), ok=False, broken=True)
    shown = ".".join(map(str, version))
    if not versions.is_supported(version):
        return Finding(name, shown, f"refused: supported is >=0.16.1,<0.20; {versions.MENDED_BY}", ok=False, broken=True)
    return Finding(name, shown, "supported", ok=True)


def _gpu(name: str) -> Finding:
    if not torch.cuda.is_available():
        return _gpu_out_of_reach(name) or Finding(name, "none", "runs on CPU over gloo; FP8 can only be emulated", ok=False)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB sm_{gpu.major}{gpu.minor}" for gpu in gpus)
    if min((gpu.major, gpu.minor) for gpu in gpus) < (8, 0):
        return Finding(name, shown, "no bf16 before sm_80: use precision=fp32, at a fraction of the speed", ok=False)
    largest = min(gpu.total_memory for gpu in gpus) / (TRAINING_BYTES * 1e9) * 0.8  # the rest: activations
    follows = f"runs over NCCL in bf16; one GPU trains about {largest:.0f}B parameters without sharding the optimizer"
    return Finding(name, f"{len(gpus)}: {shown}", follows, ok=True)


def _gpu_out_of_reach(name: str) -> Finding | None:
    """GPUs that the machine, or the container, has been given and that torch cannot use; None where there are none, or they are hidden on purpose."""
    devices = _gpu_devices()
    if not devices or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    shown = f"{len(devices)} in /dev, none usable"
    if torch.version.cuda is None:
        return Finding(name, shown, "torch is a CPU build: runs on CPU over gloo; for the GPUs install a CUDA build", ok=False)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "torch finds none"
    except RuntimeError as error:  # names the driver's version where that is too old
        reason = str(error).splitlines()[0]
    mend = f"the driver or the container's runtime is to be mended (nvidia-smi; docker run --gpus all): {reason}"
    return Finding(name, shown, mend, ok=False, broken=True)


def _gpu_devices() -> list[Path]:
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def _nccl(name: str) -> Finding:
    if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        return Finding(name, "not usable", "processes talk over gloo", ok=False)
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return Finding(name, ".".join(map(str, version)), "several GPUs and nodes", ok=True)


def _transformer_engine(name: str) -> Finding:
    problem, local = engine.version_problem(), "megatron's local layers with our norm; on a GPU no FP8 and no experts"
    version = engine.installed_version()
    if problem:
        return Finding(name, version or "absent", local if version is None else f"not used ({problem}): {local}", ok=False)
    if not torch.cuda.is_available():
        return Finding(name, str(version), "not used without a GPU: megatron's local layers with our norm", ok=False)
    return Finding(name, str(version), "its fused layers and attention; FP8 where the GPU has it", ok=True)


def _apex(name: str) -> Finding:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(name, "absent", "missed only without Transformer Engine: then a distributed optimizer over several GPUs is refused", ok=True)
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "multi_tensor_apply").is_dir() for place in places):
        mend = "an unrelated web toolkit that megatron takes for NVIDIA's and fails on: pip uninstall apex"
        return Finding(name, "PyPI's apex, not NVIDIA's", mend, ok=False, broken=True)
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return Finding(name, "NVIDIA's, without CUDA extensions", "its Adam, where Transformer Engine is not there", ok=True)
    return Finding(name, "NVIDIA's, with CUDA extensions", "fused weight gradients and its Adam, where Transformer Engine is not there", ok=True)


def _fp8(name: str) -> Finding:
    if not torch.cuda.is_available():
        return Finding(name, "no GPU", "fp8.emulated=true rounds as FP8 would, and is no faster", ok=False)
    capability = torch.cuda.get_device_capability(0)
    shown = f"sm_{capability[0]}{capability[1]}"
    if capability < FP8_CAPABILITY:
        return Finding(name, shown, "FP8 is refused before Ada (sm_89) and Hopper (sm_90)", ok=False)
    if engine.version_problem():
        return Finding(name, shown, "the GPU has FP8, but it needs Transformer Engine", ok=False)
    return Finding(name, shown, "section fp8 of a recipe: teacher, student, or both", ok=True)


def _fused_paths() -> list[Finding]:
    """One row on a machine without a GPU, else one for each path; whether Transformer Engine imports shows when a run starts."""
    if not torch.cuda.is_available():
        return [Finding("fused paths", "none of a GPU's", "torch's own kernels, in blocks that a CPU's cache holds", ok=True)]
    paths = fused.fused_paths(fused.installed(engine.version_problem()))
    return [Finding(f"fused: {path.name}", path.by or "off", "on" if path.on else f"{path.cost}; {path.mend}", ok=path.on) for path in paths]


def _cpu(name: str) -> Finding:
    usable, flags = len(os.sched_getaffinity(0)), cpu_flags()
    bf16 = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    shown = f"{usable} of {os.cpu_count()} cores, bf16: {', '.join(bf16) or 'no'}"
    if not bf16:
        return Finding(name, shown, "on CPU use fp32: bf16 would be emulated", ok=True)
    return Finding(name, shown, "on CPU bf16 is faster than fp32", ok=True)


def _memory(name: str) -> Finding:
    available = _available_memory_bytes()
    billions = available / BF16_BYTES / 1e9 * 0.8  # the rest: buffers of the reader
    follows = f"a process on CPU holds up to about {billions:.0f}B parameters in bf16; importing and pruning stream"
    return Finding(name, f"{available / GIB:.0f} GiB available", follows, ok=available > 4 * GIB)


def _disk(name: str) -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    copies, states = free / (BF16_BYTES * 8 * GB), free / (SAVED_TRAINING_BYTES * 4 * GB)
    follows = f"room for {copies:.0f} bf16 copies of 8B, or {states:.0f} training states of 4B"
    return Finding(name, f"{free / GB:.0f} GB free here", follows, ok=free > 2 * GB)


def _slurm(name: str) -> Finding:
    if shutil.which("sinfo") is None or shutil.which("srun") is None:
        return Finding(name, "absent", "start with launch/torchrun.sh", ok=True)
    shown = f"sinfo: {_first_line('sinfo', '--version')}, srun: {_first_line('srun', '--version')}"
    return Finding(name, shown, "start launch/torchrun.sh with srun, one task a node", ok="fails:" not in shown)


def _containers(name: str) -> Finding:
    present = [runtime for runtime in CONTAINER_RUNTIMES if shutil.which(runtime)]
    if not present:
        return Finding(name, "none", "no image can be built or run here; launch/ scripts install into .venv", ok=True)
    return Finding(name, ", ".join(present), "an image can be built or run here", ok=True)


def _available_memory_bytes() -> int:
    """What the kernel would give, and no more than a container's limit."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        return min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _first_line(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return f"{command[0]} does not answer"
    said = answer.stdout if answer.returncode == 0 else f"{command[0]} fails: {answer.stderr.strip()}"
    return next(iter(said.splitlines()), f"{command[0]} says nothing")
