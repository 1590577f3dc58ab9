"""How layers are dealt out to pipeline stages, against trying every split."""

from __future__ import annotations

from itertools import combinations

import pytest

from minitron_megatron.arch.architecture import Architecture, layer_cost, output_cost
from minitron_megatron.errors import LayoutError
from minitron_megatron.parallel.split import split_layers


def model(layers: int, vocab: int) -> Architecture:
    return Architecture("llama", layers, 48, 12, 4, 8, 60, vocab, True, 128, 1e-6, 10000.0)


def every_split(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)) for cut in cuts]


def slowest(split: tuple[int, ...], arch: Architecture) -> float:
    costs = [layers * layer_cost(arch) for layers in split]
    costs[-1] += output_cost(arch)
    return max(costs)


@pytest.mark.parametrize("vocab", [64, 800, 1600, 4000, 16000])
@pytest.mark.parametrize(("layers", "stages"), [(7, 1), (7, 2), (9, 3), (10, 4), (5, 5)])
def test_the_cost_rule_finds_the_smallest_slowest_stage(layers: int, stages: int, vocab: int) -> None:
    arch = model(layers, vocab)
    found = split_layers(arch, stages, "cost")
    assert (sum(found), len(found), min(found) >= 1) == (layers, stages, True)
    best = min(slowest(split, arch) for split in every_split(layers, stages))
    assert slowest(found, arch) == best


def test_the_even_rule_deals_the_remainder_to_the_first_stages() -> None:
    assert split_layers(model(26, 64), 4, "even") == (7, 7, 6, 6)
    assert split_layers(model(8, 64), 4, "even") == (2, 2, 2, 2)


def test_a_heavy_output_layer_takes_layers_off_the_last_stage() -> None:
    light, heavy = model(8, 16), model(8, 4000)
    assert split_layers(light, 2) == (4, 4)
    assert split_layers(heavy, 2)[-1] == 1


@pytest.mark.parametrize("rule", ["even", "cost"])
def test_more_stages_than_layers_are_refused(rule: str) -> None:
    with pytest.raises(LayoutError, match=r"parallel\.pipeline=4 is more than the model's 3 layers; at most 3"):
        split_layers(model(3, 64), 4, rule)
