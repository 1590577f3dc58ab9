"""One sample order for all processes of a stage: the main process builds it, the others read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minitron_megatron.artifact import Artifact
from minitron_megatron.data.answers import WithoutBoundaries, answer_samples
from minitron_megatron.data.batches import TokenDataset
from minitron_megatron.data.samples import SampleDataset, packed_samples
from minitron_megatron.parallel.world import World


def shared_samples(world: World, prefix: Path, *, samples: int, sequence_length: int, seed: int, cache: Path, repeat: bool = True) -> SampleDataset:
    """packed_samples on every process; see there for what it depends on and raises."""

    def build(here: bool) -> SampleDataset:
        return packed_samples(prefix, samples=samples, sequence_length=sequence_length, seed=seed, cache=cache, repeat=repeat, build=here)

    built = build(True) if world.is_main else None
    world.barrier()
    return built or build(False)


def training_text(
    world: World, inputs: Mapping[str, Artifact], *, samples: int, sequence_length: int, seed: int, cache: Path, mask_boundaries: bool = False
) -> TokenDataset:
    """What a stage trains on: the teacher's own text where there is an artifact `labels`, else data/train.

    mask_boundaries: a label behind an end-of-document id does not count. Every process calls this.
    """
    if "labels" in inputs:
        prefix = inputs["labels"].path / "train"
        training: TokenDataset = answer_samples(prefix, samples=samples, sequence_length=sequence_length, seed=seed)
    else:
        prefix = inputs["data"].path / "train"
        training = shared_samples(world, prefix, samples=samples, sequence_length=sequence_length, seed=seed, cache=cache)
    return WithoutBoundaries(training, int(inputs["data"].result["eod"])) if mask_boundaries else training
