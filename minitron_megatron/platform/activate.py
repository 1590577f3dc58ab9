"""Choose CPU over gloo or CUDA over NCCL for this process, once, before megatron.core is imported."""

from __future__ import annotations

import importlib.util
import os
import resource
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import engine, quiet, retarget, versions

Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Platform:
    """Where this process computes and how it talks to the others."""

    kind: Kind
    backend: Literal["gloo", "nccl"]
    device: torch.device
    transformer_engine: bool = False
    """Whether models are built of Transformer Engine's modules."""

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock may be read."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """Highest memory use so far: of the allocator on CUDA, resident memory of the process on CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB

    def free_memory_bytes(self) -> int:
        """What this process can still take: of its GPU, or its part of the host's memory."""
        if self.kind == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def supports_bf16_matmul(self) -> bool:
        """Whether bf16 is faster than fp32 here; without the instructions a CPU emulates it, many times slower."""
        if self.kind == "cuda":
            return torch.cuda.get_device_capability(self.device) >= (8, 0)
        return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one: ARM


def activate(kind: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """Set this process up for `kind` and return its Platform; `auto` is CUDA where torch sees a GPU, else CPU.

    To be called before the first import of megatron.core. A second call for the same kind returns the same Platform.
    On CUDA nothing of megatron is rebound. Raises PlatformError: unsupported megatron-core, megatron.core imported too
    early (CPU), no GPU for this process (CUDA), or another kind than at the first call.
    """
    wanted = _resolve(kind)
    active = _active()
    if "platform" not in active:
        versions.require_supported()
        active["platform"] = _activate_cpu() if wanted == "cpu" else _activate_cuda()
        quiet.silence_known_noise()
    platform = active["platform"]
    if platform.kind != wanted:
        raise PlatformError(f"platform.activate('{kind}'): this process already runs on {platform.kind}; start a new process for {wanted}")
    return platform


def megatron_flags(platform: Platform, activation: str) -> dict[str, Any]:
    """TransformerConfig arguments that depend on the machine and on what is installed; activation: of the model's FFN."""
    return _cpu_flags() if platform.kind == "cpu" else _cuda_flags(activation, platform.transformer_engine)


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the CPU as Linux names them; empty where /proc/cpuinfo is absent."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(named.partition(":")[2].split())


@cache
def _active() -> dict[str, Platform]:
    """The Platform of this process once it is set: the import hook belongs to the process, so its record does too."""
    return {}


def _resolve(kind: str) -> Kind:
    match kind:
        case "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        case "cpu" | "cuda":
            return kind
    raise PlatformError(f"platform: {kind!r} is none of auto, cpu, cuda")


def _activate_cpu() -> Platform:
    retarget.install()
    # megatron marks functions for torch.compile; on CPU that calls a C++ compiler for minutes to gain nothing
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _request_one_hardware_queue()
    return Platform("cpu", "gloo", torch.device("cpu"))


def _activate_cuda() -> Platform:
    _request_one_hardware_queue()  # before the first CUDA call: the driver reads it once
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise PlatformError(
            f"platform.activate('cuda'): LOCAL_RANK={local_rank} but torch {torch.__version__} sees {gpus} GPUs; "
            f"start at most {gpus} processes per node, or use platform=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Platform("cuda", "nccl", device, transformer_engine=engine.import_problem() is None)


def _request_one_hardware_queue() -> None:
    # tensor parallelism overlaps its all-reduce with the weight gradient only if kernels start in the order of their
    # launch; megatron warns where this is not set, on CPU too
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _cpu_flags() -> dict[str, Any]:
    return {
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        # over gloo, batched sends and receives make the gradients of PP=2 with VPP=2 silently wrong
        "batch_p2p_comm": False,
    }


def _cuda_flags(activation: str, transformer_engine: bool) -> dict[str, Any]:
    return {
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        "use_cpu_initialization": False,
        # of megatron's own attention and norms, of which no layer here is built
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": activation == "swiglu",  # of squared ReLU megatron has no fused kernel, and raises
        "bias_dropout_fusion": True,
        "apply_rope_fusion": transformer_engine,
        # megatron raises when the output layer is built, even with Transformer Engine, if the kernel is absent
        "gradient_accumulation_fusion": importlib.util.find_spec(_APEX_WEIGHT_GRADIENTS) is not None,
        "batch_p2p_comm": True,
    }


_APEX_WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""An extension module that is built with NVIDIA's apex."""
