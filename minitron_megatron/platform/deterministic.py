"""The same bits from the same numbers on CUDA (training.deterministic); a CPU over gloo gives them anyway."""

from __future__ import annotations

import os

import torch

from minitron_megatron.platform.activate import Platform


def environment() -> dict[str, str]:
    """Variables that libraries read before they compute, each with its reason."""
    return {
        # attention's backward otherwise adds in the order in which blocks come; megatron refuses its deterministic mode without it
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        # one workspace for each stream: cuBLAS otherwise chooses among algorithms by what is free
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # the switch of NVLink adds in the order in which ranks come
        "NCCL_ALGO": "^NVLS",
    }


def be_deterministic(platform: Platform) -> None:
    """To be called once, before the first matrix product and the first process group; nothing on a CPU.

    What has no deterministic kernel warns and goes on beside Transformer Engine, and raises without it.
    """
    if platform.kind == "cuda":
        os.environ.update(environment())
        # without Transformer Engine attention is torch's, whose backward adds in any order where it may merely warn
        torch.use_deterministic_algorithms(True, warn_only=platform.transformer_engine)
        # it would write into every fresh buffer, lest a program read one before it has written there: this one does not
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - torch makes it a property of the module
