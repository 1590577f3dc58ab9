"""One sample order for all processes of a stage: the main process builds it, the others read it."""

from __future__ import annotations

from pathlib import Path

from minitron_megatron.data.samples import SampleDataset, packed_samples
from minitron_megatron.parallel.world import World


def shared_samples(world: World, prefix: Path, *, samples: int, sequence_length: int, seed: int, cache: Path, repeat: bool = True) -> SampleDataset:
    """packed_samples on every process; see there for what it depends on and raises."""

    def build(here: bool) -> SampleDataset:
        return packed_samples(prefix, samples=samples, sequence_length=sequence_length, seed=seed, cache=cache, repeat=repeat, build=here)

    built = build(True) if world.is_main else None
    world.barrier()
    return built or build(False)
