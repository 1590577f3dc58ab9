"""A diverse shortlist: of the survivors that keep most importance, those that lie farthest apart.

The proxy for quality is the share of the importance mass that a shape keeps, multiplied over the axes: it costs nothing, knows nothing
of what axes mean to each other, and therefore only chooses where to start and the pool; what is trained decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.scores.units import UnitScores
from minitron_megatron.search.space import AXES

Floats = NDArray[np.float64]


class KeptImportance:
    """Architecture → share in [0, 1] of the importance mass that is kept, multiplied over the axes."""

    def __init__(self, scores: UnitScores, source: Architecture) -> None:
        self._scores, self._source = scores, source

    def __call__(self, arch: Architecture) -> float:
        share = self._layers[arch.layers] * self._channels[arch.hidden] * self._ffn[arch.ffn]
        if arch.experts:
            share *= self._experts[arch.experts]
        return float(share) * self._head_share(arch)

    @cached_property
    def _layers(self) -> Floats:
        return _kept_shares(self._scores.layers[None])

    @cached_property
    def _channels(self) -> Floats:
        return _kept_shares(self._scores.channels[None])

    @cached_property
    def _ffn(self) -> Floats:
        rows = self._scores.expert_ffn if self._source.experts else self._scores.ffn
        return _kept_shares(torch.stack(list(rows)).view(-1, self._source.ffn))

    @cached_property
    def _experts(self) -> Floats:
        return _kept_shares(torch.stack(list(self._scores.experts)))

    @cached_property
    def _groups_LGP(self) -> Tensor:
        """[L, G, P + 1] mass of the best 0, 1, … heads of each group."""
        heads_LGP = torch.stack(list(self._scores.heads)).view(self._source.layers, self._source.kv_groups, -1)
        best_LGP = heads_LGP.double().sort(-1, descending=True).values.cumsum(-1)
        return torch.nn.functional.pad(best_LGP, (1, 0))

    def _head_share(self, arch: Architecture) -> float:
        """The best heads within each group, of the best groups."""
        if (arch.heads, arch.kv_groups) not in self._head_shares:
            kept_LG = self._groups_LGP[:, :, arch.heads_per_group].sort(-1, descending=True).values[:, : arch.kv_groups]
            total_L = self._groups_LGP[:, :, -1].sum(-1)
            self._head_shares[arch.heads, arch.kv_groups] = float((kept_LG.sum(-1) / total_L.clamp_min(1e-300)).mean())
        return self._head_shares[arch.heads, arch.kv_groups]

    @cached_property
    def _head_shares(self) -> dict[tuple[int, int], float]:
        return {}


class KeptParameters:
    """Where there are no activation scores: share of the source's parameters."""

    def __init__(self, source: Architecture) -> None:
        self._all = parameter_count(source)

    def __call__(self, arch: Architecture) -> float:
        return parameter_count(arch) / self._all


def choose_diverse(architectures: Sequence[Architecture], proxy: Sequence[float], *, count: int, pool: float = 1.0) -> list[int]:
    """Indices of a shortlist: the best by proxy first, then whatever is farthest from all that are chosen, ties by proxy.

    Distance: Euclidean over the axes, each divided by its spread among the candidates. pool: share of the candidates, best proxies first,
    that may be chosen. The first n of a longer shortlist are the shortlist of n.
    """
    order = sorted(range(len(architectures)), key=lambda index: -proxy[index])
    order = order[: max(count, math.ceil(pool * len(order)))]
    places_CA = _places([architectures[index] for index in order])
    chosen: list[int] = []
    nearest_C = np.full(len(order), np.inf)
    for _ in range(min(count, len(order))):
        # argmax takes the first of equals, and the order is the proxy's
        chosen.append(int(nearest_C.argmax()))
        nearest_C = np.minimum(nearest_C, np.linalg.norm(places_CA - places_CA[chosen[-1]], axis=1).round(12))
        nearest_C[chosen] = -1.0
    return [order[index] for index in chosen]


def _places(architectures: Sequence[Architecture]) -> Floats:
    """[C, A] in [0, 1]; an axis without spread is 0."""
    sizes_CA = np.array([[float(getattr(arch, axis)) for axis in AXES] for arch in architectures])
    low_A = sizes_CA.min(0)
    spread_A = sizes_CA.max(0) - low_A
    return (sizes_CA - low_A) / np.where(spread_A > 0, spread_A, 1.0)


def _kept_shares(scores_RU: Tensor) -> Floats:
    """[U + 1] share of a row's mass in its best 0, 1, … units, mean over rows."""
    best_RU = scores_RU.double().sort(-1, descending=True).values.cumsum(-1)
    shares_U = (best_RU / best_RU[:, -1:].clamp_min(1e-300)).mean(0)
    return np.concatenate([[0.0], shares_U.numpy()])
