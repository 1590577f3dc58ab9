"""GPUs by name, from their data sheets, and what share of those figures is counted on."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_megatron.search.latency import GPUS, Gpu

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One GPU of a node."""

    name: str
    gpu: Gpu
    """Dense matrix products and memory bandwidth."""
    memory_gib: float
    nvlink_bytes_per_second: float
    """In one direction, to all others of the node together."""
    capability: tuple[int, int] = (9, 0)
    """CUDA's, which decides on the scalings of FP8."""


ACCELERATORS = {
    item.name: item
    for item in (
        # NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024), DGX B200 (2024; an eighth of the system). Where a sheet gives
        # figures with sparsity, half of them; NVLink in one direction, half of what the sheet adds up. Sheets say GB and drivers report as many GiB.
        Accelerator("A100-80GB", GPUS["A100_SXM_80GB"], 80, 300e9, (8, 0)),
        Accelerator("H100-80GB", GPUS["H100_SXM"], 80, 450e9),
        Accelerator("H200-141GB", GPUS["H200"], 141, 450e9),
        Accelerator("B200-180GB", Gpu({"bf16": 2250e12, "fp8": 4500e12}, 8.0e12), 180, 900e9, (10, 0)),
    )
}
DEFAULT = "H100-80GB"
KEPT_FREE_GIB = 6.0
"""Of each GPU, for what is not counted: CUDA context and kernels, NCCL's buffers, the allocator's fragments. A margin, not a measurement."""


@dataclass(frozen=True)
class Shares:
    """What is reached of a data sheet's figures. None was measured here: the first is such that the run of arXiv 2205.05198 (530 B parameters,
    2,240 A100s, 54.2 % of the peak) comes out (tests/unit/plan/test_time.py); `--matrix-share` takes your own."""

    matrix: float = 0.68
    """Of the peak, in matrix products alone; everything else comes on top."""
    matrix_fp8: float = 0.55
    """The same of the FP8 peak: a guess, for twice the products leave each less time to hide its loads. No run stands behind it."""
    memory: float = 0.75
    links: float = 0.7


REACHED = Shares()
