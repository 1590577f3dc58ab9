"""The shortlist spreads out, starts with the best, and the proxy is what a plan would keep."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.scores.units import UnitScores, random_scores
from minitron_megatron.search.shortlist import KeptImportance, choose_diverse

from .conftest import SMALL

SHAPES = [
    SMALL.resized(layers=layers, hidden=hidden, heads=heads, ffn=ffn)
    for layers, hidden, heads, ffn in product((2, 3, 4), (16, 24, 32), (4, 8), (16, 32, 48))
]
PROXY = np.random.default_rng(0).permutation(len(SHAPES)) / len(SHAPES)


def spread(chosen: list[Architecture]) -> float:
    """Smallest distance of any two, axes divided by their spread."""
    places = [((a.layers - 2) / 2, (a.hidden - 16) / 16, (a.heads - 4) / 4, (a.ffn - 16) / 32) for a in chosen]
    return min(float(np.linalg.norm(np.subtract(a, b))) for a, b in combinations(places, 2))


def test_a_shortlist_lies_wider_apart_than_the_best_by_proxy_and_than_random_ones() -> None:
    diverse = spread([SHAPES[index] for index in choose_diverse(SHAPES, PROXY, count=5)])
    best = spread([SHAPES[index] for index in np.argsort(-PROXY)[:5]])
    dice = np.random.default_rng(1)
    random = [spread([SHAPES[index] for index in dice.choice(len(SHAPES), 5, replace=False)]) for _ in range(200)]
    assert diverse >= 1.0 > best  # unit cube: corners are 1 apart
    assert diverse >= max(random)


def test_it_starts_with_the_best_and_a_longer_one_begins_with_the_shorter() -> None:
    long = choose_diverse(SHAPES, PROXY, count=9)
    assert long[0] == int(PROXY.argmax())
    assert choose_diverse(SHAPES, PROXY, count=4) == long[:4]
    assert len(set(long)) == 9


def test_the_pool_leaves_out_the_worst_by_proxy_but_never_fills_less_than_the_shortlist() -> None:
    pool = set(np.argsort(-PROXY)[: len(SHAPES) // 4].tolist())
    assert set(choose_diverse(SHAPES, PROXY, count=6, pool=0.25)) <= pool
    assert len(choose_diverse(SHAPES, PROXY, count=6, pool=0.01)) == 6
    assert len(choose_diverse(SHAPES[:3], PROXY[:3], count=6)) == 3


@pytest.mark.parametrize("source", [SMALL, Architecture("mixtral", 3, 24, 8, 4, 6, 16, 131, False, 64, 1e-5, 1e4, None, None, 4, 2)])
def test_the_proxy_is_the_mass_of_the_units_that_are_kept(source: Architecture) -> None:
    scores = random_scores(source, seed=3)
    experts = {"experts": 3} if source.experts else {}
    target = source.resized(layers=2, hidden=16, heads=source.heads // 2, ffn=8, **experts)
    expected = mass(scores.layers, 2) * mass(scores.channels, 16) * _heads(scores, source)
    if source.experts:
        expected *= mean([mass(row, 8) for layer in scores.expert_ffn for row in layer]) * mean([mass(row, 3) for row in scores.experts])
    else:
        expected *= mean([mass(row, 8) for row in scores.ffn])
    proxy = KeptImportance(scores, source)
    assert proxy(target) == pytest.approx(expected, rel=1e-12)
    assert proxy(source) == pytest.approx(1.0)


def test_of_key_value_groups_the_best_are_counted() -> None:
    scores = random_scores(SMALL, seed=3)
    target = SMALL.resized(kv_groups=1, heads=3)
    rows = [max(row.view(2, 4).sort(-1).values[:, -3:].sum(-1)) / row.sum() for row in scores.heads]
    assert KeptImportance(scores, SMALL)(target) == pytest.approx(mean([float(row) for row in rows]))


def _heads(scores: UnitScores, source: Architecture) -> float:
    half = source.heads // 2 // source.kv_groups
    return mean(
        [sum(float(group.sort().values[-half:].sum()) for group in row.view(source.kv_groups, -1)) / float(row.sum()) for row in scores.heads]
    )


def mass(row: torch.Tensor, count: int) -> float:
    return float(row.sort().values[-count:].sum() / row.sum())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
