"""Which layers go, given figures that are known: by hand, and by trying every order."""

from __future__ import annotations

import math
import random

import pytest
import torch

from minitron_megatron.depth.choice import Choice, Layers, Measure, choose, is_noise, order_of_removal, unclear_rounds
from minitron_megatron.depth.measured import Measured, error_of_difference, of_samples
from minitron_megatron.errors import PlanError


def fixed(values: dict[Layers, float], stderr: float | None = None) -> tuple[list[Layers], Measure]:
    asked: list[Layers] = []

    def measure(layers: Layers) -> Measured:
        asked.append(layers)
        return Measured(values[layers], stderr)

    return asked, measure


def test_ranked_takes_the_least_missed_of_the_layers_that_may_go() -> None:
    asked, measure = fixed({(1,): 0.3, (2,): 0.1, (3,): 0.2, (4,): 0.4}, stderr=0.001)
    choice = Choice("ranked", 2, range(1, 5))
    rounds = choose(choice, measure)
    assert order_of_removal(rounds) == [2, 3]
    assert asked == [(1,), (2,), (3,), (4,)] and choice.measurements == 4
    assert rounds[0].margin == pytest.approx((0.1, math.hypot(0.001, 0.001))) and rounds[0].is_noise is False


def test_a_block_is_left_out_as_a_whole_and_protected_layers_are_in_none() -> None:
    asked, measure = fixed({(1, 2): 0.5, (2, 3): 0.2, (3, 4): 0.3})
    choice = Choice("block", 2, range(1, 5))
    rounds = choose(choice, measure)
    assert order_of_removal(rounds) == [2, 3]
    assert asked == [(1, 2), (2, 3), (3, 4)] and choice.measurements == 3
    assert rounds[0].is_noise is None  # no error is known


def test_greedy_removal_measures_the_rest_beside_what_is_gone() -> None:
    """Against the definition, on random figures of every set."""
    dice = random.Random(3)
    values = {tuple(layer for layer in range(6) if chosen >> layer & 1): dice.random() for chosen in range(64)}
    asked, measure = fixed(values)
    choice = Choice("greedy", 3, range(6))
    rounds = choose(choice, measure)
    gone: set[int] = set()
    for item in rounds:
        best = min((values[tuple(sorted({*gone, layer}))], layer) for layer in range(6) if layer not in gone)[1]
        assert item.chosen == [(best,)] and set(item.removed) == gone
        gone.add(best)
    assert len(asked) == len(set(asked)) == choice.measurements == 6 + 5 + 4


def test_the_highest_accuracy_goes_and_of_equal_ones_the_later_layer() -> None:
    _, measure = fixed({(0,): 0.5, (1,): 0.7, (2,): 0.7, (3,): 0.6})
    assert order_of_removal(choose(Choice("ranked", 2, range(4), higher_is_better=True), measure)) == [2, 1]


def test_where_all_candidates_go_there_is_no_margin() -> None:
    _, measure = fixed({(0,): 0.5, (1,): 0.7}, stderr=0.1)
    (item,) = choose(Choice("ranked", 2, range(2)), measure)
    assert item.margin is None and item.is_noise is None and item.to_dict()["next"] is None


def test_a_choice_is_noise_below_two_standard_errors_of_the_difference() -> None:
    for apart, noise in ((0.27, True), (0.29, False)):
        _, measure = fixed({(0,): 1.0, (1,): 1.0 + apart}, stderr=0.1)
        (item,) = choose(Choice("ranked", 1, range(2)), measure)
        assert item.is_noise == noise  # 2 · √2 · 0.1 = 0.283


def test_without_an_error_nobody_says_that_a_choice_is_clear() -> None:
    values = {(0,): 1.0, (1,): 1.1}
    told = {error: is_noise(choose(Choice("ranked", 1, range(2)), fixed(values, stderr=error)[1])) for error in (None, 0.1, 0.01)}
    assert told == {None: None, 0.1: True, 0.01: False}
    assert is_noise(choose(Choice("ranked", 2, range(2)), fixed(values)[1])) is False  # nothing was left to choose


def test_an_order_that_is_noise_makes_no_other_model_where_both_go() -> None:
    values = {(0,): 1.0, (1,): 1.1, (2,): 9.0, (0, 1): 2.0, (0, 2): 9.0}
    _, measure = fixed(values, stderr=0.1)
    rounds = choose(Choice("greedy", 2, range(3)), measure)
    assert [item.is_noise for item in rounds] == [True, False] and unclear_rounds(rounds) == []
    (first,) = choose(Choice("greedy", 1, range(3)), measure)
    assert unclear_rounds([first]) == [first]


def test_what_is_no_number_stays_and_nothing_is_chosen_of_nothing_else() -> None:
    _, measure = fixed({(0,): math.nan, (1,): 3.0, (2,): math.inf})
    assert order_of_removal(choose(Choice("ranked", 1, range(3)), measure)) == [1]
    with pytest.raises(PlanError, match="nothing finite is measured"):
        choose(Choice("ranked", 2, range(3)), measure)


def test_samples_that_both_candidates_saw_tell_their_difference_more_surely() -> None:
    generator = torch.Generator().manual_seed(0)
    easy, tokens = 3 * torch.rand(50, generator=generator, dtype=torch.float64), torch.full((50,), 7.0, dtype=torch.float64)
    apart = 0.01 * torch.rand(50, generator=generator, dtype=torch.float64)
    one, other = (of_samples(torch.stack([loss * tokens, tokens], dim=-1)) for loss in (easy, easy + apart))
    assert one.value == pytest.approx(float(easy.mean())) and one.stderr == pytest.approx(float(easy.std() / 50**0.5))
    assert error_of_difference(other, one) == pytest.approx(float(apart.std() / 50**0.5))
    assert error_of_difference(other, one) < 0.02 * math.hypot(one.stderr, other.stderr)  # type: ignore[operator, arg-type]


def test_the_error_of_a_ratio_is_that_of_drawing_other_samples() -> None:
    """Against the spread over many draws."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 + torch.rand(4000, 40, generator=generator, dtype=torch.float64)
    parts = weights * torch.rand(4000, 40, generator=generator, dtype=torch.float64)
    draws = [of_samples(torch.stack(pair, dim=-1)) for pair in zip(parts, weights, strict=True)]
    spread = torch.tensor([draw.value for draw in draws]).std()
    told = torch.tensor([draw.stderr for draw in draws]).mean()  # type: ignore[misc]
    assert float(told / spread) == pytest.approx(1, abs=0.04)  # 4000 draws: 1 % of chance, 2 % of first order


def test_one_sample_has_no_error() -> None:
    assert of_samples(torch.tensor([[2.0, 4.0]])) == Measured(0.5, None, (2.0,), (4.0,))
