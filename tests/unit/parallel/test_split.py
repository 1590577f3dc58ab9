"""How layers are dealt out to pipeline stages, against trying every split."""

from __future__ import annotations

from itertools import combinations

import pytest

from minitron_megatron.arch.architecture import Architecture, layer_cost, output_cost
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.errors import LayoutError
from minitron_megatron.parallel.split import EndWork, distillation_work, hidden_state_work, layer_works, logits_work, split_layers


def model(layers: int, vocab: int) -> Architecture:
    return Architecture("llama", layers, 48, 12, 4, 8, 60, vocab, True, 128, 1e-6, 10000.0)


def every_split(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)) for cut in cuts]


def slowest(split: tuple[int, ...], ends: EndWork) -> float:
    work = list(map(float, split))
    work[0] += ends.first
    work[-1] += ends.last
    return max(work)


@pytest.mark.parametrize("ends", [EndWork(), EndWork(0.3, 0.7), EndWork(0, 2.4), EndWork(1.9, 0), EndWork(2.2, 6.1), EndWork(0.01, 30)])
@pytest.mark.parametrize(("layers", "stages"), [(7, 1), (7, 2), (9, 3), (10, 4), (11, 6), (5, 5)])
def test_the_cost_rule_finds_the_smallest_slowest_stage(layers: int, stages: int, ends: EndWork) -> None:
    found = split_layers(layers, stages, "cost", ends)
    assert (sum(found), len(found), min(found) >= 1) == (layers, stages, True)
    assert slowest(found, ends) == min(slowest(split, ends) for split in every_split(layers, stages))


@pytest.mark.parametrize("last", [0, 0.3, 1.5, 3.2, 6.9, 10])
@pytest.mark.parametrize(("layers", "ranks", "virtual"), [(4, 2, 2), (13, 2, 2), (9, 2, 3), (13, 3, 2), (12, 4, 2), (10, 2, 4)])
def test_with_virtual_stages_the_cost_rule_finds_the_smallest_slowest_rank(layers: int, ranks: int, virtual: int, last: float) -> None:
    """The work of a rank is that of all its stages: a heavy last stage leaves the others of its rank with less."""

    def slowest_rank(split: tuple[int, ...]) -> float:
        work = [float(sum(split[rank::ranks])) for rank in range(ranks)]
        return max(work[0] + 0.01, *work[1:-1], work[-1] + last)

    found = split_layers(layers, ranks * virtual, "cost", EndWork(0.01, last), ranks=ranks)
    assert (sum(found), len(found), min(found) >= 1) == (layers, ranks * virtual, True)
    assert slowest_rank(found) == pytest.approx(min(slowest_rank(split) for split in every_split(layers, ranks * virtual)))


@pytest.mark.parametrize("ends", [EndWork(), EndWork(0.3, 0.7), EndWork(1.9, 0), EndWork(2.2, 6.1)])
@pytest.mark.parametrize("stages", [1, 2, 3, 5, 9])
def test_the_cost_rule_weighs_layers_of_different_widths(stages: int, ends: EndWork) -> None:
    arch = model(9, 131).resized(ffn=[60, 5, 5, 40, 12, 60, 60, 7, 31])
    works = layer_works(arch)
    assert sum(works) == pytest.approx(9, rel=1e-3)  # in layers of mean width, which is a whole number of parameters

    def slowest_of(split: tuple[int, ...]) -> float:
        stop = [sum(split[: stage + 1]) for stage in range(stages)]
        work = [sum(works[end - layers : end]) for end, layers in zip(stop, split, strict=True)]
        work[0] += ends.first
        work[-1] += ends.last
        return max(work)

    found = split_layers(9, stages, "cost", ends, works)
    assert (sum(found), len(found), min(found) >= 1) == (9, stages, True)
    assert slowest_of(found) == pytest.approx(min(slowest_of(split) for split in every_split(9, stages)), rel=1e-12)
    assert layer_works(model(9, 131)) == ()


def test_the_even_rule_deals_the_remainder_to_the_first_stages() -> None:
    assert split_layers(26, 4, "even") == (7, 7, 6, 6)
    assert split_layers(8, 4, "even") == (2, 2, 2, 2)


def test_a_list_is_for_models_of_as_many_layers_and_others_are_split_by_cost() -> None:
    assert split_layers(7, 3, [1, 4, 2]) == (1, 4, 2)
    assert split_layers(9, 3, [1, 4, 2]) == (3, 3, 3)


def test_a_list_for_another_number_of_stages_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"layers_per_stage=\[3, 4\] has 2 entries for 3 stages"):
        split_layers(7, 3, [3, 4])


def test_forward_work_counts_the_output_layer_in_layers() -> None:
    arch = model(8, 4000)
    assert logits_work(arch).last == output_cost(arch) / layer_cost(arch)
    assert hidden_state_work(arch).last == 0
    assert split_layers(8, 2, "cost", logits_work(arch))[-1] == 1
    assert split_layers(8, 2, "cost", hidden_state_work(arch)) == (4, 4)


def test_distillation_counts_the_students_output_three_times_and_the_teachers_once() -> None:
    """In units of a student's layer, whose forward and backward are three products of its weights."""
    student, teacher = model(8, 800), model(12, 800).resized(hidden=96)
    expected = (3 * 800 * 48 + 800 * 96) / (3 * layer_cost(student))
    assert distillation_work(student, teacher).last == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["even", "cost"])
def test_more_stages_than_layers_are_refused(rule: str) -> None:
    with pytest.raises(LayoutError, match=r"parallel\.pipeline × parallel\.virtual = 4 is more than the model's 3 layers; at most 3"):
        split_layers(3, 4, rule)


def test_a_list_for_virtual_stages_is_none_for_passes_without_them() -> None:
    virtual = Parallel(pipeline=2, virtual=2, layers_per_stage=[1, 2, 3, 1]).without_virtual_stages()
    assert (virtual.virtual, virtual.layers_per_stage) == (1, "cost")
    plain = Parallel(pipeline=2, layers_per_stage=[3, 4])
    assert plain.without_virtual_stages() == plain
