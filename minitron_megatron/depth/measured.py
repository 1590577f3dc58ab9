"""What was measured of one candidate, how sure it is, and how far two are apart.

Legend: N samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """A figure with its standard error (None where there is no telling); per-sample parts where it is a ratio of two sums over samples."""

    value: float
    stderr: float | None
    numerators: tuple[float, ...] = ()
    denominators: tuple[float, ...] = ()


def of_samples(sums_N2: Tensor) -> Measured:
    """Σ of the first column over Σ of the second; independent samples, equal on every process."""
    numerators, denominators = sums_N2.unbind(-1)
    value, stderr = ratio(numerators, denominators)
    return Measured(value, stderr, tuple(numerators.tolist()), tuple(denominators.tolist()))


def ratio(numerators_N: Tensor, denominators_N: Tensor) -> tuple[float, float | None]:
    """A ratio of sums and its standard error to first order; of equal denominators that of a mean."""
    samples, total = len(numerators_N), denominators_N.sum()
    value = numerators_N.sum() / total
    if samples < 2:
        return float(value), None
    spread = (numerators_N - value * denominators_N).square().sum() * samples / (samples - 1)
    return float(value), float(spread.sqrt() / total)


def error_of_difference(one: Measured, other: Measured) -> float | None:
    """Standard error of the difference of two values; sample by sample where both were measured on the same samples, which is much less."""
    if one.numerators and one.denominators == other.denominators:
        apart = torch.tensor(one.numerators, dtype=torch.float64) - torch.tensor(other.numerators, dtype=torch.float64)
        return ratio(apart, torch.tensor(one.denominators, dtype=torch.float64))[1]
    if one.stderr is None or other.stderr is None:
        return None
    return math.hypot(one.stderr, other.stderr)
