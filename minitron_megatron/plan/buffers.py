"""Weights, gradients and optimizer state of a rank in training, element by element as megatron-core 0.16 lays them out.

DistributedDataParallel keeps the gradients of a chunk in one fp32 buffer, cut into buckets; with the distributed optimizer the weights lie in such
a buffer too, each begins at a multiple of 64, each bucket ends at one of lcm(d, 128), and each of the d data-parallel ranks has the state of its
d-th part of every bucket (param_and_grad_buffer.py, distrib_optimizer.py). Per parameter: bf16 2 + 4 + 12 bytes without, 6 + 12/d with it; fp32
4 + 4 + 8 and 8 + 8/d, because the weights are their own main copy (dist_optimizer.md of Megatron-LM has the table).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from minitron_megatron.config.distill import Training
from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.plan.fp8 import is_fp8
from minitron_megatron.plan.split import Split
from minitron_megatron.plan.weights import Weight

FP32 = 4
WEIGHT_START, BUCKET_END = 64, 128
"""Elements; megatron's padding for kernels that want aligned addresses."""


class TrainedBytes(NamedTuple):
    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments and, below fp32, the main copy of the weights: what this rank keeps of them."""


@dataclass(frozen=True)
class Buffer:
    """Where each weight of a chunk lies; in elements."""

    places: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, rank: int, ranks: int) -> int:
        """Elements of weights, without padding, in this rank's part of every bucket."""
        found = 0
        for start, end in self.buckets:
            part = (end - start) // ranks
            low, high = start + rank * part, start + (rank + 1) * part
            found += sum(max(0, min(high, stop) - max(low, begin)) for begin, stop in self.places)
        return found


def lay_out(weights: Sequence[Weight], *, ranks: int, shared_out: bool, bucket_elements: int | None) -> Buffer:
    """In megatron's order: the last weight first. shared_out: with the distributed optimizer; bucket_elements: None is one bucket."""
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    at = bucket_start = 0

    def close(end: int) -> int:
        buckets.append((bucket_start, _up(end, math.lcm(ranks, BUCKET_END)) if shared_out else end))
        return buckets[-1][1]

    for weight in reversed(weights):
        at = _up(at, WEIGHT_START) if shared_out else at
        alone = weight.on_both_ends and shared_out
        if alone and at > bucket_start and places and places[-1][1] > bucket_start:
            at = bucket_start = close(at)
        places.append((at, at + weight.elements))
        at += weight.elements
        if alone or (bucket_elements is not None and at - bucket_start >= bucket_elements):
            at = bucket_start = close(at)
    if places and places[-1][1] > bucket_start:
        close(at)
    return Buffer(tuple(places), tuple(buckets))


def trained_bytes(
    split: Split,
    chunks: Sequence[Sequence[Weight]],
    training: Training,
    *,
    stage: int,
    data_rank: int,
    width: int,
    fp8: ModelFp8 | None = None,
) -> TrainedBytes:
    """Of one rank. chunks: the weights of each of its chunks; stage: its pipeline rank; data_rank: its number among its replicas;
    width: bytes of a weight that is not FP8.

    FP8 weights lie in buffers of their own, a byte each, and have a main copy as bf16 ones have.
    """
    several = split.replicas > 1  # training/optimizer.py: nothing is shared out over one rank
    shared_out = several and training.distributed_optimizer
    weights = gradients = state = 0
    for number, chunk in enumerate(chunks):
        for of_experts, of_a_byte in product((False, True), (False, True)):
            own = [weight for weight in chunk if weight.of_experts == of_experts and _is_byte(weight, fp8, split.arch.layers) == of_a_byte]
            ranks = split.replicas // split.expert if of_experts else split.replicas
            buckets = several and training.overlap_grad_reduce and stage == 0 and number == 0
            # bucket_size of DistributedDataParallel; later stages and chunks have one bucket
            buffer = lay_out(
                own, ranks=ranks, shared_out=shared_out, bucket_elements=max(40_000_000, 1_000_000 * split.replicas) if buckets else None
            )
            plain = sum(weight.elements for weight in own)
            weights += (buffer.elements if shared_out else plain) * (1 if of_a_byte else width)
            gradients += buffer.elements
            state += buffer.owned(data_rank // (split.replicas // ranks), ranks) if shared_out else plain
    of_state = 2 * FP32 + (FP32 if width < FP32 else 0)
    return TrainedBytes(weights, gradients * FP32, state * of_state)


def _is_byte(weight: Weight, fp8: ModelFp8 | None, layers: int) -> bool:
    return fp8 is not None and fp8.weights and is_fp8(weight, fp8, layers)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
