"""A model dealt out to the ranks of a layout: which layers, embedding and output layer each of a rank's chunks has.

A chunk is one of a rank's virtual pipeline stages; rank p has the chunks p, p + P, p + 2P, … of the model's depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.parallel.split import EndWork, layer_works, split_layers


class Chunk(NamedTuple):
    """Part of a model on one rank."""

    layers: range
    """Over the whole model, from 0."""
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Split:
    """Sizes of a model's groups and the layers of each (virtual) stage."""

    arch: Architecture
    tensor: int
    pipeline: int
    data: int
    sequence: bool
    layers: tuple[int, ...]
    """Of every stage in the order of the model's depth: pipeline × virtual of them."""
    expert: int = 1
    context: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights: gradients are summed over them, and the optimizer's state is shared out over them."""
        return self.data * self.context

    @property
    def virtual(self) -> int:
        return len(self.layers) // self.pipeline

    def chunks(self, rank: int) -> list[Chunk]:
        """Of one pipeline rank, in the order of the model's depth."""
        return [self._chunk(stage) for stage in range(rank, len(self.layers), self.pipeline)]

    def all_chunks(self) -> Iterator[Chunk]:
        return (self._chunk(stage) for stage in range(len(self.layers)))

    def tokens(self, samples: int, sequence: int) -> int:
        """Between the tensor-parallel regions on one rank: all that its context rank has of the samples, or under sequence parallelism its part."""
        return samples * sequence // self.context // (self.tensor if self.sequence else 1)

    @property
    def vocabulary_rows(self) -> int:
        """Of one tensor rank, with the padding that makes all equal (model/gpt.py, padded_vocab)."""
        return -(-self.arch.vocab // self.tensor)

    def _chunk(self, stage: int) -> Chunk:
        start = sum(self.layers[:stage])
        return Chunk(range(start, start + self.layers[stage]), stage == 0, stage == len(self.layers) - 1)


def split_of(arch: Architecture, parallel: Parallel, ends: EndWork) -> Split:
    """As model/build.py deals it out; raises LayoutError for more stages than layers."""
    stages = parallel.pipeline * parallel.virtual
    layers = split_layers(arch.layers, stages, parallel.layers_per_stage, ends, layer_works(arch), ranks=parallel.pipeline)
    return Split(arch, parallel.tensor, parallel.pipeline, parallel.data, parallel.sequence, layers, parallel.expert, parallel.context)


def teacher_split(arch: Architecture, own: TeacherParallel, parallel: Parallel, ends: EndWork) -> Split:
    """own: the teacher's sizes; its data-parallel size is what the processes leave."""
    layers = split_layers(arch.layers, own.pipeline, own.layers_per_stage, ends, layer_works(arch), ranks=own.pipeline)
    data = parallel.processes // (own.tensor * parallel.context * own.pipeline)
    return Split(arch, own.tensor, own.pipeline, data, own.sequence, layers, parallel.expert, parallel.context)
