"""A curve: what one piece of work costs at several sizes of one quantity, and how that grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Work = Callable[[], Any]


@dataclass(frozen=True)
class Curve:
    """prepare: (size, empty folder) → the work, which can be done again and again; what prepare does is not measured."""

    work: str
    quantity: str
    sizes: tuple[int, ...]
    prepare: Callable[[int, Path], Work]
    why: str = ""
    """Reason, where it is known to grow faster than linearly."""


@dataclass(frozen=True)
class Point:
    """What one size cost, in a process of its own."""

    size: int
    seconds: float
    """Of the fastest run."""
    megabytes: float
    """Peak of resident memory in the first run, over what was there before it."""


def fastest(first: Sequence[Point], second: Sequence[Point]) -> list[Point]:
    """Of two measurements of the same sizes."""
    return [Point(a.size, min(a.seconds, b.seconds), min(a.megabytes, b.megabytes)) for a, b in zip(first, second, strict=True)]


@dataclass(frozen=True)
class Fit:
    """cost ≈ c · size^exponent, by least squares of the logarithms."""

    exponent: float
    stderr: float
    at_the_end: float
    """Exponent between the last two points: what a constant start at small sizes does not hide."""

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in vars(self).items()}


NOISE_MEGABYTES = 4.0
"""Below it a peak says nothing: the allocator's own steps are as large."""
WORSE, WORSE_AT_THE_END = 1.25, 1.5
"""Exponents above them are worse than linear: half-way to quadratic at the end, since from one run to the next a point moves by 20 % here,
and the exponent between two doubled sizes by 0.3; over all points half as much."""


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Raises ValueError for fewer than 4 points."""
    if len(sizes) < 4:
        raise ValueError(f"{len(sizes)} points")
    x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(costs, dtype=float))
    away = x - x.mean()
    exponent = float(away @ y / (away @ away))
    rest = y - y.mean() - exponent * away
    stderr = math.sqrt(float(rest @ rest) / (len(x) - 2) / float(away @ away))
    return Fit(exponent, stderr, float((y[-1] - y[-2]) / (x[-1] - x[-2])))


def fit_memory(points: Sequence[Point]) -> Fit | None:
    """None where even the largest size asks for less than can be seen."""
    seen = [point for point in points if point.megabytes >= NOISE_MEGABYTES]
    return fit([point.size for point in seen], [point.megabytes for point in seen]) if len(seen) >= 4 else None


def is_worse_than_linear(found: Fit) -> bool:
    return found.exponent > WORSE or found.at_the_end > WORSE_AT_THE_END
