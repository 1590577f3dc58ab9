"""One process of one layout of benchmarks/step_overhead.py, under torchrun: `step_worker.py LAYOUT FOLDER`.

Our step, the two baselines and the peer's step take turns in the same processes; the first one leaves FOLDER/LAYOUT.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from step_shapes import ROUNDS

from minitron_megatron.platform import activate, retarget


def main(name: str, folder: Path) -> None:
    platform = activate("cpu")
    retarget.install(("modelopt.torch",))
    from step_run import Run  # behind the hook: it imports megatron

    from minitron_megatron.parallel.world import distributed_world

    with distributed_world(platform) as world:
        run = Run(name, folder, world)
        seconds = alternate(run.steps)
        found = {"seconds": seconds, **run.findings()}
        if world.is_main:
            (folder / f"{name}.json").write_text(json.dumps(found))


def alternate(steps: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each step until the last process is through, round by round; every other round in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            taken = timed(steps[name])
            if number:  # the first round makes the buffers
                seconds[name].append(taken)
    return seconds


def timed(step: Callable[[], Any]) -> float:
    dist.barrier()
    began = time.monotonic()
    step()
    dist.barrier()
    return time.monotonic() - began


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
