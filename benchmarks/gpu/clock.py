"""Time and peak memory of something that is done several times."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from minitron_megatron.platform import Platform

GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """Seconds of each run; memory in GiB, on a CPU of the whole process since its start."""

    runs: list[float]
    peak_gib: float
    """Highest use in these runs."""
    over_gib: float
    """The same over what was held before them."""

    @property
    def seconds(self) -> float:
        return median(self.runs)

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "runs": self.runs, "peak_gib": self.peak_gib, "over_gib": self.over_gib}


def measured(step: Callable[[], Any], platform: Platform, *, runs: int, warm_up: int = 2, held: int | None = None) -> Measured:
    """Each run from an idle device to an idle device. What is compiled, allocated or tuned once happens in the runs before.

    held: bytes that memory is counted over; by default what is held behind those first runs, with the buffers that they leave behind.
    """
    for _ in range(warm_up):
        step()
    platform.synchronize()
    now = reset_peak(platform)
    before = now if held is None else held
    seconds = []
    for _ in range(runs):
        began = time.monotonic()
        step()
        platform.synchronize()
        seconds.append(time.monotonic() - began)
    peak = platform.peak_memory_bytes()
    return Measured(seconds, peak / GIB, max(0, peak - before) / GIB)


def reset_peak(platform: Platform) -> int:
    """Bytes in use now, from which on the peak is counted."""
    if platform.kind == "cpu":
        return platform.peak_memory_bytes()
    import torch

    torch.cuda.reset_peak_memory_stats(platform.device)
    return torch.cuda.memory_allocated(platform.device)


def release(platform: Platform) -> None:
    """Gives back what nothing refers to any more: models and optimizers refer to each other in circles."""
    gc.collect()
    if platform.kind == "cuda":
        import torch

        torch.cuda.empty_cache()


def failed(error: Exception) -> dict[str, str]:
    """What stands in the place of a measurement: a table with a reason in one row is worth more than none."""
    return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
