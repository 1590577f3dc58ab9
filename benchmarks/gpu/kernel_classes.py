"""Where the time of a step goes: what a profile says of each kernel, put together by what kind of work it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("communication", ("nccl", "userbuffers")),
    ("attention", ("flash", "fmha", "sdpa", "attention")),
    ("optimizer", ("multi_tensor", "multitensor", "adam")),
    ("norms, rotary, gates", ("rmsnorm", "layernorm", "layer_norm", "rms_norm", "norm_fwd", "norm_bwd", "rotary", "rope", "swiglu", "normalization")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "gemv")),
    ("FP8 casts", ("quantize", "cast_transpose", "fp8", "amax", "float8", "blockwise", "block_scaled", "cast_gated", "nvte")),
    ("compiled element-wise work (KD loss, fused gates)", ("triton",)),
    ("copies and zeroing", ("memcpy", "memset", "copy_kernel", "catarray", "fillfunctor", "direct_copy")),
    ("element-wise work", ("elementwise", "reduce_kernel", "vectorized", "index", "embedding", "softmax", "scatter", "gather")),
)
"""What a kernel's name has in it; the first class that fits. Norms come ahead of casts: a fused one that writes FP8 has both in its name."""
OTHER = "other"


class Kernel(NamedTuple):
    name: str
    seconds: float


def kernel_class(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, marks in CLASSES if any(mark in lower for mark in marks)), OTHER)


def by_class(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Seconds of each class, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        seconds[kernel_class(kernel.name)] += kernel.seconds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def profiled(step: Callable[[], Any], device: str) -> list[Kernel]:
    """Kernels of one step on a GPU; on a CPU its operators, so that the way there can be tried."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return [Kernel(event.key, getattr(event, spent) / 1e6) for event in found.key_averages() if getattr(event, spent) > 0]
