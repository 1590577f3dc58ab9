"""Which fused paths of a GPU are used here, what each rests on, and what is lost without it; every one of them can be missing.

Read in megatron-core 0.16.1 (optimizer/__init__.py, clip_grads.py, rope_utils.py, jit.py) and in Transformer Engine 2.11. What the lack of one costs
is said in words: nothing of it has been measured here on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from minitron_megatron.platform import engine
from minitron_megatron.platform.activate import Platform

MODULES = ("amp_C", "apex", "flash_attn", "flash_attn_interface", "fused_weight_gradient_mlp_cuda", "triton")
"""Top-level modules that a path may rest on; flash_attn_interface is FlashAttention 3's."""


@dataclass(frozen=True)
class Installed:
    """What decides, of one process."""

    engine_problem: str | None
    """Why Transformer Engine is not used; None where it is."""
    modules: frozenset[str]
    """Those of MODULES that can be imported."""
    compiles: bool = True
    """False where torch.compile is switched off by its own variable."""

    @property
    def engine(self) -> bool:
        return self.engine_problem is None


@dataclass(frozen=True)
class FusedPath:
    """One path: by what it is on, or what the lack of it costs and what brings it back."""

    name: str
    by: str | None
    cost: str
    mend: str

    @property
    def on(self) -> bool:
        return self.by is not None


def installed(engine_problem: str | None) -> Installed:
    """Of this process's Python; nothing is imported."""
    found = frozenset(name for name in MODULES if importlib.util.find_spec(name) is not None)
    return Installed(engine_problem, found, compiles=os.environ.get("TORCHDYNAMO_DISABLE", "0") in ("", "0"))


def fused_paths(here: Installed) -> list[FusedPath]:
    """All of them, those that cost most first."""
    te, apex = ("Transformer Engine" if here.engine else None), ("apex" if "apex" in here.modules else None)
    compiled = "torch.compile" if here.compiles and "triton" in here.modules else None
    absent = here.engine_problem == "absent"
    with_te = f"install Transformer Engine {engine.wanted_versions()}" if absent else f"Transformer Engine: {here.engine_problem}"
    with_te_or_apex, with_triton = f"{with_te}; or NVIDIA's apex", "install triton, leave TORCHDYNAMO_DISABLE unset"
    return [
        FusedPath("layers", te, "norms run apart from the products behind them; no FP8, no overlap of tensor-parallel exchange, no experts", with_te),
        FusedPath("attention", _attention(here), "", ""),
        FusedPath("loss", compiled, "every step of the loss reads and writes a chunk's fp32 logits anew", with_triton),
        FusedPath("activation and residual", compiled, "SwiGLU, bias and residual are several passes over a layer's activations", with_triton),
        FusedPath(
            "weight gradients",
            te or ("apex" if "fused_weight_gradient_mlp_cuda" in here.modules else None),
            "each micro-batch writes its gradients in bf16 and then adds them to the fp32 ones: a pass over all weights more",
            f"{with_te_or_apex} with its CUDA extensions",
        ),
        FusedPath(
            "Adam",
            te or apex,
            "torch's Adam goes over weights and moments several times a step; training.distributed_optimizer is refused",
            with_te_or_apex,
        ),
        FusedPath(
            "gradient norm",
            te or ("apex" if {"apex", "amp_C"} <= here.modules else None),
            "a kernel for every weight, for the norm and for clipping, in place of one for many",
            with_te_or_apex,
        ),
        FusedPath("rotary embedding", te, "several small kernels on queries and keys of every layer", with_te),
        FusedPath("stages' messages", "megatron's batched sends and receives", "", ""),
    ]


def _attention(here: Installed) -> str:
    """Never missing: no path keeps [S, S] scores, so that apex's fused softmax has nothing to do. In fp32 it is torch's (model/engine_spec.py)."""
    if not here.engine:
        return "torch's scaled_dot_product_attention"
    flash = [name for name, module in (("FlashAttention 3", "flash_attn_interface"), ("FlashAttention 2", "flash_attn")) if module in here.modules]
    return f"Transformer Engine, which chooses among {', '.join([*flash, 'cuDNN'])}"


def first_lines(platform: Platform) -> list[str]:
    """For the beginning of a run: the paths that are on in one line, and one for each that is not."""
    if platform.kind == "cpu":
        return ["on CPU: torch's own kernels, none of a GPU's fused paths"]
    problem = None if platform.transformer_engine else engine.import_problem()
    paths = fused_paths(installed(problem))
    missing = [f"not fused: {path.name} ({path.cost}); {path.mend}" for path in paths if not path.on]
    return [f"fused: {', '.join(path.name for path in paths if path.on)}", *missing]
