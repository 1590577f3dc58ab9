"""The element-wise work of a chunk, compiled, against itself uncompiled; a process of its own, because dynamo is off in CPU processes.

Usage: compiled_losses.py DEVICE. Prints one JSON object: objective → largest difference of sums, losses and gradient over the largest of each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "0"

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.platform import activate
from minitron_megatron.training.losses import chunk
from minitron_megatron.training.losses.logits import Chunk, Logits
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.terms import Shard

TOKENS, ROWS = 24, 1_503
EVERY = {"forward_kl": 0.7, "reverse_kl": 0.3, "mse": 0.2, "cosine": 3.0, "cross_entropy": 0.4}
OBJECTIVES = {
    "forward_kl": LossSettings(),
    "two, weights on the device": LossSettings({"forward_kl": torch.tensor(0.7), "cross_entropy": torch.tensor(0.4)}),
    "all in one read": LossSettings(EVERY, temperature=2.0),
}


def main(device: str) -> None:
    activate("cpu" if device == "cpu" else "cuda")
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    shard, found = Shard(0, dist.group.WORLD), {}
    for name, settings in OBJECTIVES.items():
        on_device = LossSettings({key: weight_on(weight, device) for key, weight in settings.weights.items()}, settings.temperature)
        plain, compiled = (outcome(make, on_device, shard, device) for make in (lambda function: function, whole_graph))
        apart = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain, compiled, strict=True)]
        found[name] = float(torch.tensor(apart).max())  # NaN where one is: Python's own max passes over it
        torch._dynamo.reset()
    print(json.dumps(found))
    dist.destroy_process_group()


def weight_on(weight: float | Tensor, device: str) -> float | Tensor:
    return weight.to(device) if isinstance(weight, Tensor) else weight


def whole_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Raises where a part could not be compiled with the rest."""
    return torch.compile(function, fullgraph=True)


def outcome(make: Callable[..., Any], settings: LossSettings, shard: Shard, device: str) -> list[Tensor]:
    """Sums of the shard, losses and gradient."""
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(TOKENS, ROWS, generator=generator).mul_(3).to(device) for _ in range(2)]
    labels, weights = torch.randint(ROWS, (TOKENS,), generator=generator).to(device), torch.rand(TOKENS, generator=generator).to(device)
    block = Chunk(Logits(logits[0], (logits[1],)), labels, weights)
    sums = make(chunk._sums)(block, settings, shard)
    losses = make(chunk._losses)(block, [part[None] for part in sums], [1.0], settings, shard, True)
    return [*sums, losses, logits[0]]


if __name__ == "__main__":
    main(sys.argv[1])
