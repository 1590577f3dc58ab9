"""Block Influence with its standard error, of single layers and of contiguous blocks (P2 section 2.2; of layers: ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitron_megatron.errors import ArtifactError
from minitron_megatron.scores.statistics import Statistics, influence_axis


def influence_of_blocks(statistics: Statistics, layers: int) -> tuple[Tensor, Tensor]:
    """[L − layers + 1] 1 − mean cos(what enters, what leaves) by a block's first layer, and its standard error over samples, fp64.

    The error of a single sample is NaN. Raises ArtifactError where the pass has not measured blocks of so many layers.
    """
    axis, starts = influence_axis(layers), range(statistics.arch.layers - layers + 1)
    if (0, axis) not in statistics.sums:
        raise ArtifactError(f"the scores hold no Block Influence of blocks of {layers} layers; measure it with: importance.block_sizes=[{layers}]")
    total, squares = torch.stack([statistics.sums[first, axis] for first in starts]).unbind(-1)
    mean, samples = total / statistics.samples, statistics.samples
    if samples < 2:
        return 1 - mean, torch.full_like(mean, math.nan)
    variance = (squares - samples * mean.square()).clamp_min(0) / (samples - 1)
    return 1 - mean, (variance / samples).sqrt()
