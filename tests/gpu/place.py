"""What a measurement computes with: this process's platform and groups, models of a house, and its text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import Batch, collate
from minitron_megatron.data.samples import evaluation_windows
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.parallel.layout import Layout, destroy_layout, global_layout
from minitron_megatron.parallel.world import World, distributed_world
from minitron_megatron.platform import Platform, activate

from .houses import House
from .setting import Setting


@dataclass(frozen=True)
class Place:
    """One process with its groups."""

    setting: Setting
    world: World
    layout: Layout

    @property
    def platform(self) -> Platform:
        return self.world.platform

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.setting.precision)

    def fp8(self, *, weights: bool = False) -> ModelFp8 | None:
        scaling: Any = self.setting.fp8
        return ModelFp8(scaling, weights=weights, emulated=self.setting.device == "cpu") if scaling else None

    def build(self, arch: Architecture, *, spec: str = "", weights: bool = False, **arguments: Any) -> StageModel:
        """weights: FP8 ones. spec: another than the setting's."""
        platform = _with_spec(self.platform, spec or self.setting.spec)
        fp8 = self.fp8(weights=weights)
        return build_model(arch, self.layout, platform, self.dtype, fp8=fp8, **arguments)

    def model(self, house: House, *, checkpoint: Path | None = None, **arguments: Any) -> StageModel:
        """The house's source model, or what another checkpoint holds of the same shape."""
        model = self.build(house.architecture(), **arguments)
        load_model(model, checkpoint or house.artifacts / "import" / "checkpoint")
        return model

    def text(self, house: House, *, samples: int, length: int) -> list[Batch]:
        """Held-out windows, a micro-batch of `samples`."""
        windows = evaluation_windows(house.artifacts / "data" / "heldout", sequence_length=length, tokens=samples * length)
        if len(windows) < samples:
            raise ValueError(f"{house.folder}: {len(windows)} held-out windows of {length} tokens, {samples} are wanted")
        return [collate(windows, range(samples)).to(self.platform.device)]


@contextmanager
def place(setting: Setting) -> Iterator[Place]:
    with distributed_world(activate(setting.device)) as world:
        try:
            yield Place(setting, world, global_layout(Parallel(), world))
        finally:
            destroy_layout()


def _with_spec(platform: Platform, spec: str) -> Platform:
    """On CUDA the platform says which spec is built; a CPU has one."""
    if platform.kind == "cpu":
        return platform
    if spec == "te" and not platform.transformer_engine:
        raise RuntimeError("Transformer Engine does not import here: `minitron doctor` says why")
    return replace(platform, transformer_engine=spec == "te")


def allocated_bytes(models: list[StageModel], platform: Platform) -> int:
    """Of the allocator on CUDA; on CPU, where there is none to ask, of the weights."""
    if platform.kind == "cuda":
        torch.cuda.synchronize(platform.device)
        return torch.cuda.memory_allocated(platform.device)
    return sum(weight.untyped_storage().nbytes() for model in models for weight in model.parameters())


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp64; NaN where there is one."""
    a, b = actual.double(), expected.double()
    return float((a - b).norm() / b.norm())
